"""The CUDA half compiles, for what a toolkit knows, and says which devices run it; no GPU is needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from e3kernels import building

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "layer_graph.cu"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.skipif(not SOURCE.exists(), reason="the sources are not at hand: this is an installed package")
@pytest.mark.parametrize(
    "target", ["90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("75", "80", "120"))]
)
def test_layer_graph_compiles_without_spills(target, tmp_path):
    command = ["nvcc", "-std=c++20", "-O3", "-Icsrc", f"-gencode=arch=compute_{target},code=sm_{target}", "-Xptxas=-v"]
    done = subprocess.run(
        [*command, "-cubin", str(SOURCE), "-o", str(tmp_path / "layer_graph.cubin")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill stores" in line]
    assert spills
    assert all(" 0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


CUDA_12_4 = {50, 52, 60, 61, 70, 72, 75, 80, 86, 87, 89, 90}
CUDA_13 = {75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121}


@pytest.mark.parametrize(
    ("known", "ptx", "machine_code"),
    [
        (CUDA_12_4, 75, [80, 90]),
        (CUDA_13, 75, [80, 90, 100, 120]),
        ({*CUDA_13, 130, 140} - {75}, 80, [80, 90, 100, 120]),
    ],
)
def test_every_device_from_the_oldest_on_has_code(known, ptx, machine_code):
    targets = [
        re.fullmatch(r"-gencode=arch=compute_(\d+),code=(compute|sm)_\1", flag) for flag in building.cuda_targets(known)
    ]
    assert [int(target[1]) for target in targets if target[2] == "compute"] == [ptx]
    assert [int(target[1]) for target in targets if target[2] == "sm"] == machine_code


@pytest.mark.parametrize(
    ("capability", "driver", "kernels", "ptx", "binary", "graph", "reason"),
    [
        (75, 13000, "found", 75, 75, True, "code for sm_75"),
        (80, 12040, "found", 80, 80, True, "code for sm_80"),
        (89, 13000, "found", 80, 80, True, "code for sm_80"),
        (90, 13000, "found", 90, 90, True, "code for sm_90"),
        (103, 13000, "found", 100, 100, True, "code for sm_100"),
        (110, 13000, "found", 75, 110, True, "compiled by the driver for sm_110 from PTX of compute_75"),
        (121, 13000, "found", 120, 120, True, "code for sm_120"),
        (140, 14000, "found", 75, 140, True, "compiled by the driver for sm_140 from PTX of compute_75"),
        (90, 12020, "found", 90, 90, False, "the driver serves CUDA 12.2; conditional graph nodes need 12.4"),
        (70, 12080, "no image", 0, 0, False, "the module holds no code for sm_70"),
        (110, 12080, "ptx too new", 0, 0, False, "the module's PTX for sm_110 is newer than the driver's CUDA 12.8"),
    ],
)
def test_the_path_of_a_device(capability, driver, kernels, ptx, binary, graph, reason):
    runtime = pytest.importorskip("e3kernels._runtime", reason="e3kernels._runtime is not built")
    chosen, why = runtime.choose_path(capability, driver, kernels, ptx, binary)
    assert chosen == graph
    assert why.startswith(reason)
