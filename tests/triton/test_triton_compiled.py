"""What Triton's compiler and torch.compile make of the kernels, in processes of their own without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.static.variants import VOCABULARIES

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "bench" / "results" / "static.json"
needs_record = pytest.mark.skipif(not RECORDED.exists(), reason="`python -m bench.static` has not been run")
KEY_VARIANTS = ("entropy_kl/bf16/forward/row", "topk_kl/bf16/bucket")


def run(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_record
def test_no_kernel_spills_or_moves_more_than_recorded():
    """Compiles what has changed since it was recorded; under another Triton, where all has, the main kernels only."""
    same = json.loads(RECORDED.read_text())["versions"]["triton"] == triton.__version__
    assert run("-m", "bench.static", "--check", *(() if same else KEY_VARIANTS)).strip() == ""


# Instructions per logit of both models, at most: without labels, and with the cross-entropy's own exponential.
BOUNDS = {"entropy_kl_statistics": (16, 20), "topk_kl_statistics": (16, 20), "entropy_kl_gradient": (16, 27)}


@needs_record
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_every_launch_for_a_vocabulary_sweeps_by_whole_accesses_and_few_instructions(vocabulary):
    """What `launch.py` chooses for few rows and many, dense and stored teachers, k up to 128; of the record, which the
    test above holds to the present kernels."""
    recorded = json.loads(RECORDED.read_text())["ours"]
    swept = 0
    for variant, kernels in recorded.items():
        for kernel, families in kernels.items():
            if f"/{vocabulary}" in variant and kernel in BOUNDS:
                row = families["sm_90"]
                assert row["spills"] == 0, (variant, kernel)
                assert "load128" in row["accesses"], (variant, kernel)
                assert row["instructions_per_element"] <= BOUNDS[kernel][1], (variant, kernel)
                swept += 1
    assert swept >= 10


@needs_record
def test_the_statistics_of_the_entropy_weights_take_at_most_16_instructions_per_logit():
    recorded = json.loads(RECORDED.read_text())["ours"]
    for kernel, (bound, _) in BOUNDS.items():
        variant = "topk_kl/bf16/bucket" if kernel.startswith("topk") else "entropy_kl/bf16/forward"
        assert recorded[variant][kernel]["sm_90"]["instructions_per_element"] <= bound, kernel


CHANGED = """
import json, sys
from bench.static.measure import check
recorded = json.load(open(sys.argv[1]))["ours"]
row = recorded["gated_residual/bf16/scalar"]["gated_residual_forward"]["sm_90"]
row["bytes_per_element"], row["fingerprint"] = 5, "of another kernel"
print(check(["gated_residual/bf16/scalar"], ["sm_90"], recorded))
"""


@needs_record
def test_a_kernel_that_is_not_the_recorded_one_is_compiled_and_compared():
    assert "gated_residual_forward sm_90: 6.0 bytes an element, recorded 5" in run("-c", CHANGED, str(RECORDED))


COPIES = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from bench.static.capture import launches
from bench.static.variants import _scalars
from e3kernels.triton import entropy_kl

class Copies(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        result = operator(*arguments, **(keywords or {}))
        given, made = (getattr(x, "device", None) for x in (arguments[0] if arguments else None, result))
        if given == torch.device("cpu") and made == torch.device("meta"):
            print(operator)
        return result

def step():
    student = torch.empty(512, 4096)
    for items in (torch.tensor(7.0, dtype=torch.float64, device="cpu"), torch.tensor(7, device="cpu")):
        entropy_kl.entropy_kl(student, student, None, None, _scalars(), 1, 0, -100, 1, items, True)

with Copies():
    launches("sm_90", step, None)
"""


def test_numbers_reach_the_device_without_a_copy_from_host_memory():
    """Such a copy waits for the device, and no CUDA graph can capture it; the meta device stands for it."""
    assert run("-c", COPIES) == ""


AGAIN = """
import sys
sys.path[:0] = ["bench", "bench/ops"]
from contextlib import ExitStack
from unittest import mock
import host_time
import torch
from e3kernels.triton.launch import launched
from triton.runtime import JITFunction

runs, own = [], []

def handles(kernel):
    kernel.module, kernel.function, kernel._run = 0, 0, lambda *arguments: runs.append(arguments)

def plain(value):
    return (value.dtype, value.shape) if isinstance(value, torch.Tensor) else value

with ExitStack() as stack:
    host_time.never_launched(stack, handles)
    bound = JITFunction.run
    stack.enter_context(mock.patch.object(JITFunction, "run", lambda *a, **k: own.append(1) or bound(*a, **k)))
    for name, call in host_time.steps().items():
        seen = []
        for again in range(2):
            runs.clear(), own.clear()
            call()
            # the seventh is for a profiler's hooks
            seen.append([[plain(value) for value in (*run[:6], *run[7:])] for run in runs])
        assert seen[0] == seen[1] and seen[0], name
        assert not own, name
        print(name, len(seen[0]))
"""


def test_what_was_compiled_is_launched_again_with_the_arguments_that_triton_binds(tmp_path):
    output = run("-W", "ignore", "-c", AGAIN).splitlines()
    assert output == ["entropy_kl 5", "entropy_kl, value 4", "topk_kl 6", "gated_residual 1", "gumbel_topk 2"]


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


FORWARD = (
    *("entropy_kl_statistics", "entropy_kl_gradient", "topk_kl_tokens", "gated_residual_forward"),
    *("e3.gumbel_topk.triton", "e3.linear_entropy_kl.triton"),
)


def test_a_training_step_is_one_graph_that_holds_the_launches():
    """No break, every launch visible, and no graph more for other scalars or more tokens; fake tensors."""
    graphs, forward, backward = run(str(ROOT / "tests" / "triton" / "traced_step.py"), "cpu").splitlines()[-3:]
    assert int(graphs) == 2  # one with the first scalars and size as constants, one for all others
    assert all(name in forward for name in FORWARD)
    assert "gated_residual_gradient" in backward


@pytest.mark.slow
def test_the_launches_of_a_step_on_cuda_tensors_are_one_graph(cuda_guard):
    """The same for fake CUDA tensors, the backward operators called by name."""
    output = run(str(ROOT / "tests" / "triton" / "traced_step.py"), "cuda", *cuda_guard).splitlines()
    graphs, nodes, on_cpu = output[-3:]
    assert int(graphs) == 2
    # No CPU tensor, which would keep the graph from capture, but the conversion of each float that is an input.
    assert all(name.startswith("convert_element_type") for name in on_cpu.removeprefix("CPU tensors:").split())
    assert all(name in nodes for name in (*FORWARD, "gated_residual_gradient"))
