"""What Triton's compiler and torch.compile make of the kernels, in processes of their own without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "bench" / "results" / "static.json"
KEY_VARIANTS = ("entropy_kl/bf16/forward/row", "topk_kl/bf16/bucket")


def run(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_kernel_spills_or_moves_more_than_recorded():
    """Compiles what has changed since it was recorded; under another Triton, where all has, the main kernels only."""
    same = json.loads(RECORDED.read_text())["versions"]["triton"] == triton.__version__
    assert run("-m", "bench.static", "--check", *(() if same else KEY_VARIANTS)).strip() == ""


CHANGED = """
import json, sys
from bench.static.measure import check
recorded = json.load(open(sys.argv[1]))["ours"]
row = recorded["gated_residual/bf16/scalar"]["gated_residual_forward"]["sm_90"]
row["bytes_per_element"], row["fingerprint"] = 5, "of another kernel"
print(check(["gated_residual/bf16/scalar"], ["sm_90"], recorded))
"""


def test_a_kernel_that_is_not_the_recorded_one_is_compiled_and_compared():
    assert "gated_residual_forward sm_90: 6.0 bytes an element, recorded 5" in run("-c", CHANGED, str(RECORDED))


@pytest.fixture
def cuda_guard(tmp_path) -> list[str]:
    """The built cuda_guard.cpp where PyTorch has no CUDA of its own."""
    if torch.backends.cuda.is_built():
        return []
    folder, library = Path(torch.__file__).parent, tmp_path / "cuda_guard.so"
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{folder / 'include'}", f"-L{folder / 'lib'}", "-lc10"]
    source = Path(__file__).with_name("cuda_guard.cpp")
    subprocess.run(["c++", str(source), "-o", str(library), *options], check=True)
    return [str(library)]


def test_a_training_step_is_one_graph_that_holds_the_launches(cuda_guard):
    """No break, every launch visible, and no graph more for other scalars or more tokens; fake tensors."""
    lines = run(str(ROOT / "tests" / "ops" / "traced_step.py"), *cuda_guard).splitlines()[-5:]
    graphs, forward, backward, cuda_graphs, on_cuda = lines
    assert int(graphs) == 2  # one with the first scalars and size as constants, one for all others
    assert int(cuda_graphs) == 2
    for kernel in ("entropy_kl_statistics", "entropy_kl_gradient", "topk_kl_tokens", "gated_residual_forward"):
        assert kernel in forward
        assert kernel in on_cuda
    for operator in ("e3.gumbel_topk.triton", "e3.linear_entropy_kl.triton"):
        assert operator in forward
        assert operator in on_cuda
    assert "gated_residual_gradient" in backward
    assert "gated_residual_gradient" in on_cuda
