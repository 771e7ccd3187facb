"""What only the compiled kernels promise: every instruction set, any number of threads, no crash on bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import e3kernels as e3k
from e3kernels import backends

ROOT = Path(__file__).parents[2]
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
SUITES = [
    f"tests/ops/test_{name}.py"
    for name in ("entropy_kl", "extreme_logits", "topk_kl", "sparse_rows", "gumbel_topk", "gated_residual")
]

pytestmark = pytest.mark.skipif("native" in backends.unavailable, reason=str(backends.unavailable.get("native")))


def runnable():
    return [] if "native" in backends.unavailable else ISAS[: ISAS.index(torch.ops.e3.native_isa()) + 1]


@pytest.mark.parametrize("isa", [isa for isa in runnable() if isa != torch.ops.e3.native_isa()])
def test_operations_on_the_other_instruction_sets(isa):
    """The operations' own tests, in a process that E3_ISA holds to one instruction set."""
    tests = [*SUITES, "-k", "native and not compile and not opcheck", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *tests],
        cwd=ROOT, env=os.environ | {"E3_ISA": isa}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_isa_is_the_one_asked_for():
    code = "import torch, e3kernels; print(torch.ops.e3.native_isa())"
    for isa in runnable():
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"E3_ISA": isa}, capture_output=True, text=True
        )
        assert done.stdout.strip() == isa


def test_an_unknown_isa_is_refused_by_name():
    done = subprocess.run(
        [sys.executable, "-c", "import e3kernels"], cwd=ROOT, env=os.environ | {"E3_ISA": "sse9"}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "E3_ISA=sse9: this machine runs baseline to" in done.stderr


def test_python_alone_defines_the_operators_and_each_has_a_kernel():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("e3::")]
    assert "e3::entropy_kl_tile" in names
    for name in names:
        definition, _, kernels = torch._C._dispatch_dump(name).partition("alias analysis")
        assert "registration.py" in definition, definition
        assert " registered at " in kernels, name


@pytest.fixture(params=[1, 3, 8])
def rows(request):
    return request.param


def on_threads(count, function):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "adaptive"])
def test_threads_change_no_bit_of_a_loss(rows, dtype, divergence):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(rows, 9001, generator=generator).to(dtype) for _ in range(2))
    student[0, 2048:4096] = -torch.inf  # a block that needs its own reference
    teacher[0, 2048:4096] = -torch.inf
    student[-1, 7000], teacher[-1, 8000] = 500.0, 400.0
    labels = torch.arange(rows) * 700
    ids = torch.arange(12).mul(611).expand(rows, 12).contiguous()
    logprobs = teacher.float().log_softmax(-1).gather(-1, ids)

    def run():
        results = []
        for call in (
            lambda z: e3k.entropy_kl(z, teacher, labels, kd_ratio=0.5, divergence=divergence, return_stats=True),
            lambda z: e3k.topk_kl(z, logprobs, ids, labels, kd_ratio=0.5, divergence=divergence, return_stats=True),
        ):
            leaf = student.clone().requires_grad_()
            loss, stats = call(leaf)
            loss.backward()
            results += [loss.detach(), stats.kl, stats.teacher_entropy, stats.cross_entropy, leaf.grad]
        return results

    with e3k.use_backend("native"):
        alone, together = on_threads(1, run), on_threads(4, run)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_threads_change_no_bit_of_a_gate(rows):
    generator = torch.Generator().manual_seed(2)
    hidden, branch, grad = (torch.randn(rows, 5, 1009, generator=generator) for _ in range(3))
    gate = torch.rand(rows, 1, 1, generator=generator)

    def run():
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, branch, gate)]
        out = e3k.gated_residual(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    with e3k.use_backend("native"):
        for one, other in zip(on_threads(1, run), on_threads(4, run), strict=True):
            assert torch.equal(one, other)


def test_a_large_gradient_takes_the_memory_that_a_freed_one_left():
    student, teacher = (torch.randn(4, 1 << 21, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))

    def gradient(scale):
        leaf = (student * scale).requires_grad_()
        return torch.autograd.grad(e3k.entropy_kl(leaf, teacher), leaf)[0]

    with e3k.use_backend("native"):
        torch.ops.e3.release_memory()
        first = gradient(1)
        kept = first.clone()
        second = gradient(2)
        assert second.data_ptr() != first.data_ptr()  # the first one lives
        place = first.data_ptr()
        del first
        third = gradient(3)
        assert third.data_ptr() == place
        del third
        torch.ops.e3.release_memory()
        assert torch.equal(gradient(1), kept)
        assert torch.equal(gradient(2), second)


def test_a_tile_is_replaced_by_its_gradient():
    student, teacher = (torch.randn(5, 999, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6))
    ids = torch.arange(10).mul(97).expand(5, 10).contiguous()
    logprobs = teacher.log_softmax(-1).gather(-1, ids)
    incoming = torch.linspace(-1, 1, 5)
    for name, others, scalars, codes in (
        ("entropy_kl", (teacher,), SCALARS, (1, 0, -100)),
        ("topk_kl", (logprobs, ids), SCALARS[:6].clone(), (1, 0, -100, 0)),
    ):
        inputs = (*others, None, None, scalars, *codes)
        loss, stats, grad = getattr(torch.ops.e3, name).native(student, *inputs, 2, None, True)
        tile = student.clone()
        tile_loss, tile_stats, tile_grad = getattr(torch.ops.e3, f"{name}_tile")(tile, *inputs, 2, None, True)
        assert tile_grad.data_ptr() == tile.data_ptr()
        for ours, theirs in ((tile_loss, loss), (tile_stats, stats), (tile, grad)):
            assert torch.equal(ours, theirs)
        tile = student.clone()
        getattr(torch.ops.e3, f"{name}_tile_backward")(incoming, tile, *inputs)
        assert torch.equal(tile, getattr(torch.ops.e3, f"{name}_backward").native(incoming, student, *inputs))
        with pytest.raises(RuntimeError, match="student must be contiguous to be replaced"):
            getattr(torch.ops.e3, f"{name}_tile")(torch.randn(5, 1000)[:, :999], *inputs, 2, None, True)


SCALARS = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
CODES = (1, 0, -100, 1, None, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": torch.zeros(3, 6, dtype=torch.float64)}, "student must be float32, bfloat16 or float16"),
        ({"student": torch.zeros(3)}, "student must have 2 dimensions, has 1"),
        ({"student": torch.zeros(6, 3).t()}, "student must have contiguous rows"),
        ({"teacher": torch.zeros(3, 7)}, "teacher must have the student's shape"),
        ({"labels": torch.tensor([0, 6, 1])}, r"labels\[1\] is 6"),
        ({"labels": torch.tensor([0, -5, 1])}, r"labels\[1\] is -5"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, "labels must be a vector of 3 values"),
        ({"labels": torch.zeros(3)}, "labels must be a vector"),
        ({"token_mask": torch.ones(4, dtype=torch.bool)}, "token_mask must be a vector of 3 values"),
        ({"scalars": SCALARS[:6]}, "scalars must be 8 contiguous float64 values"),
    ],
)
def test_the_operator_itself_refuses_bad_input(change, message):
    tensors = {
        "student": torch.zeros(3, 6), "teacher": torch.zeros(3, 6), "labels": None, "token_mask": None,
        "scalars": SCALARS,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.e3.entropy_kl.native(*(tensors | change).values(), *CODES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_ids": torch.tensor([[0, 1], [2, 6], [0, 1]])}, r"teacher_ids must lie in \[0, 6\), has 6"),
        ({"teacher_ids": torch.tensor([[0, 1], [2, -1], [0, 1]])}, "has -1"),
        ({"teacher_ids": torch.zeros(3, 3, dtype=torch.long)}, "teacher_ids must have the shape of teacher_logprobs"),
        ({"teacher_ids": torch.zeros(3, 2)}, "teacher_ids must be int64"),
        ({"teacher_logprobs": torch.zeros(3, 2).double()}, "teacher_logprobs must be float32"),
        ({"teacher_logprobs": torch.zeros(2, 2)}, r"teacher_logprobs and teacher_ids must be \(3, k\)"),
    ],
)
def test_the_sparse_operator_refuses_bad_input(change, message):
    tensors = {
        "student": torch.zeros(3, 6), "teacher_logprobs": torch.full((3, 2), -1.0),
        "teacher_ids": torch.zeros(3, 2, dtype=torch.long),
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.e3.topk_kl.native(
            *(tensors | change).values(), None, None, SCALARS[:6].clone(), 1, 0, -100, 0, 1, None, True
        )


def test_the_other_operators_refuse_bad_input():
    scalars = torch.tensor([1.0, 1.0], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"k must lie in \[0, 5\], is 6"):
        torch.ops.e3.gumbel_topk.native(torch.zeros(5), scalars, 6, 0, 0, 0)
    with pytest.raises(RuntimeError, match="branch_out must have the dtype and shape of hidden"):
        torch.ops.e3.gated_residual.native(torch.zeros(5), torch.zeros(4), torch.zeros(()))
    with pytest.raises(RuntimeError, match="gate must broadcast to hidden"):
        torch.ops.e3.gated_residual.native(torch.zeros(5), torch.zeros(5), torch.zeros(2, 5))
