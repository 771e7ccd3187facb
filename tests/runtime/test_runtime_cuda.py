"""The CUDA half compiles for every architecture that it names; no GPU is needed, and none has run it here."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "layer_graph.cu"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.skipif(not SOURCE.exists(), reason="the sources are not at hand: this is an installed package")
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_layer_graph_compiles_without_spills(architecture, tmp_path):
    target = tmp_path / "layer_graph.o"
    command = ["nvcc", "-std=c++20", "-O3", "-Icsrc", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    done = subprocess.run(
        [*command, "-Xptxas=-v", "-c", str(SOURCE), "-o", str(target)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill stores" in line]
    assert spills
    assert all(" 0 bytes spill stores, 0 bytes spill loads" in line for line in spills)
