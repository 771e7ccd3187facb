"""The CUDA half compiles, for what a toolkit knows, and says which devices run it; no GPU is needed."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from e3kernels import building

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "layer_graph.cu"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """compiled("90"): the file with the machine code, and what the assembler says of its kernels."""
    if shutil.which("nvcc") is None or not SOURCE.exists():
        pytest.skip("nvcc is not installed, or the sources are not at hand")

    @cache
    def compile_for(target):
        cubin = tmp_path_factory.mktemp("layer_graph") / "layer_graph.cubin"
        command = ["nvcc", "-std=c++20", "-O3", "-Icsrc", f"-gencode=arch=compute_{target},code=sm_{target}"]
        done = subprocess.run(
            [*command, "-Xptxas=-v", "-cubin", str(SOURCE), "-o", str(cubin)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return cubin, done.stderr

    return compile_for


@pytest.mark.parametrize(
    "target", ["90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("75", "80", "120"))]
)
def test_layer_graph_compiles_without_spills(compiled, target):
    spills = [line for line in compiled(target)[1].splitlines() if "spill stores" in line]
    assert spills
    assert all(" 0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


# The loop that reads the weights: loads of 16 bytes for each load of weights, and at most so many instructions with it.
LOOPS = {"project<1, __nv_bfloat16>": (2, 24), "project<1, float>": (1.5, 8), "project<8, __nv_bfloat16>": (5, 92)}


def test_weights_and_vectors_are_read_sixteen_bytes_at_a_time(compiled):
    """One load of weights took eight scalar loads of the vector, and 31 instructions."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run([tool, "-sass", compiled("90")[0]], capture_output=True, text=True, check=True).stdout
    code = dict(map(_function, listing.split("Function : ")[1:]))
    for name, (loads, instructions) in LOOPS.items():
        lines = next(lines for kernel, lines in code.items() if f"::{name}(" in kernel)
        body = max(_loops(lines), key=lambda loop: sum("LDG.E.128" in line for line in loop))
        wide = sum("LDG.E.128" in line for line in body)
        assert not any("LDG" in line and "LDG.E.128" not in line for line in body), name
        assert len(body) <= instructions * wide / loads, name


def _function(text):
    name = subprocess.run(["c++filt", text.split()[0]], capture_output=True, text=True, check=True).stdout
    return name, re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)


def _loops(lines):
    """The instructions of every loop: from where a branch goes back to, to the branch."""
    for at, line in lines:
        back = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
        if back and int(back[1], 16) < int(at, 16):
            yield [inner for place, inner in lines if int(back[1], 16) <= int(place, 16) <= int(at, 16)]


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
