"""What Triton's compiler and torch.compile make of the kernels, in processes of their own without the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
KEY_VARIANTS = ("entropy_kl/bf16/forward", "entropy_kl/bf16/forward/row", "topk_kl/bf16/bucket")


def run(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_key_kernels_neither_spill_nor_move_more_than_recorded(target):
    assert run("-m", "bench.static", "--target", target, "--check", *KEY_VARIANTS).strip() == ""


@pytest.mark.slow
def test_no_kernel_spills_or_moves_more_than_recorded():
    assert run("-m", "bench.static", "--check").strip() == ""


def test_the_noise_is_compiled_without_fused_multiply_adds():
    fused, exact = run("-m", "tests.ops.compiled_noise").splitlines()[-2:]
    assert fused == "0 0"
    assert exact == "True True"


def test_a_training_step_is_one_graph_that_holds_the_launches():
    """No break, every launch visible, and no graph more for a change of any scalar; fake tensors, nothing is run."""
    lines = run("-m", "tests.ops.traced_step").splitlines()[-5:]
    graphs, forward, backward, cuda_graphs, on_cuda = lines
    assert int(graphs) <= 2  # one with the first scalars as constants, one for all others
    assert int(cuda_graphs) <= 2
    for kernel in ("entropy_kl_statistics", "entropy_kl_gradient", "topk_kl_tokens", "gated_residual_forward"):
        assert kernel in forward
        assert kernel in on_cuda
    assert "e3.gumbel_topk.triton" in forward
    assert "gated_residual_gradient" in backward
    assert "gated_residual_gradient" in on_cuda
