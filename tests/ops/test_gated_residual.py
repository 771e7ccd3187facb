import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import e3kernels as e3k

OPERATION = "gated_residual"


def make(shape, gate_shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    h, f, m = (torch.randn(size, generator=generator) for size in (shape, shape, gate_shape))
    return [h.to(dtype), f.to(dtype), m.to(dtype)]


def textbook(h, f, m):
    return h + m * (f - h)


@st.composite
def gate_shapes(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    kept = draw(st.integers(0, len(shape)))
    gate = [draw(st.sampled_from([1, size])) for size in shape[len(shape) - kept :]]
    return shape, gate


@given(shapes=gate_shapes(), seed=st.integers(0, 10**6))
def test_equals_the_textbook_in_fp64(with_gradients, shapes, seed):
    inputs = make(*shapes, seed)
    ours, naive = with_gradients(e3k.gated_residual, inputs, 3), with_gradients(textbook, inputs, 3)
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=1e-12)


@given(shapes=gate_shapes(), seed=st.integers(0, 10**6))
def test_error_is_no_worse_than_naive(backend, dtype, with_gradients, assert_no_worse, shapes, seed):
    inputs = make(*shapes, seed, dtype)
    exact = with_gradients(textbook, [tensor.double() for tensor in inputs], 3)
    ours = with_gradients(e3k.gated_residual, inputs, 3)
    assert [tensor.dtype for tensor in ours] == [dtype] * 4
    assert_no_worse(ours, with_gradients(textbook, inputs, 3), exact, dtype)


def test_closed_and_open_gates_are_exact(backend, dtype):
    h, f, _ = make((7, 33), (), 1, dtype)
    h = h * 1000
    assert torch.equal(e3k.gated_residual(h, f, torch.zeros((), dtype=dtype)), h)
    assert torch.equal(e3k.gated_residual(h, f, torch.ones((), dtype=dtype)), f)


def test_layout_does_not_matter(backend):
    h, f, m = make((6, 10), (6, 1), 2, torch.float32)
    expected = e3k.gated_residual(h, f, m)
    assert torch.equal(e3k.gated_residual(h.t().contiguous().t(), f, m.expand(6, 10)), expected)
    assert torch.equal(e3k.gated_residual(h[:, ::2], f[:, ::2], m), expected[:, ::2])


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.float64])
def test_gate_may_be_wider_than_the_states(backend, gate_dtype):
    h, f, m = make((2, 3, 4), (), 3, torch.float32)
    h, f, m = h.bfloat16().requires_grad_(), f.bfloat16().requires_grad_(), m.to(gate_dtype).requires_grad_()
    out = e3k.gated_residual(h, f, m)
    out.sum().backward()
    assert (out.dtype, h.grad.dtype, f.grad.dtype, m.grad.dtype) == (torch.bfloat16,) * 3 + (gate_dtype,)
    assert m.grad.item() == pytest.approx((f - h).float().sum().item(), rel=0.05, abs=0.2)


def test_nan_in_gives_nan_out(backend):
    h, f, m = make((2, 3), (2, 1), 4, torch.float32)
    f[0, 1] = torch.nan
    assert e3k.gated_residual(h, f, m).isnan().nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("columns", [3, 700])
@pytest.mark.parametrize("by", ["tensor", "row", "element"])
def test_a_closed_gate_hides_what_is_behind_it(backend, dtype, by, columns):
    """m = 0 gives h and m = 1 gives f, to the bit, whatever the other one holds; so do the gradients."""
    garbage = torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype).repeat(columns)[:columns].expand(2, columns)
    clean, _, _ = make((2, columns), (), 9, dtype)
    shape = {"tensor": (), "row": (2, 1), "element": (2, columns)}[by]
    incoming = torch.randn(2, columns, generator=torch.Generator().manual_seed(10)).to(dtype)
    for end in (0.0, -0.0, 1.0):
        h, f = (garbage, clean) if end else (clean, garbage)
        leaves = [tensor.clone().requires_grad_() for tensor in (h, f)]
        out = e3k.gated_residual(*leaves, torch.full(shape, end, dtype=dtype))
        assert torch.equal(out, clean)
        grad_hidden, grad_branch = torch.autograd.grad(out, leaves, incoming)
        assert torch.equal(grad_branch if end else grad_hidden, incoming)
        assert (grad_hidden if end else grad_branch).eq(0).all()


def test_garbage_behind_a_gate_of_many(backend):
    """The other elements do not feel it, and neither does a gate whose gradient does not reach it."""
    h, f, _ = make((2, 40), (), 11, torch.float32)
    m = torch.tensor([[0.0], [0.3]])
    f[0, ::2], incoming = math.inf, torch.ones(2, 40)
    incoming[0, ::2] = 0.0
    leaves = [tensor.clone().requires_grad_() for tensor in (h, f, m)]
    out = e3k.gated_residual(*leaves)
    torch.testing.assert_close(out[1], textbook(h, f, m)[1])
    gate = torch.autograd.grad(out, leaves, incoming, retain_graph=True)[2]
    torch.testing.assert_close(gate[0], (f - h)[0, 1::2].sum()[None])  # 0·∞ counts as 0
    infinite = torch.autograd.grad(out, leaves, torch.ones(2, 40))
    assert infinite[2][0].item() == math.inf  # which is the slope there
    assert infinite[1][0].eq(0).all()
    huge = torch.autograd.grad(e3k.gated_residual(*leaves), leaves, torch.full((2, 40), math.inf))
    assert huge[1][0].eq(0).all()


def test_gradcheck():
    inputs = [tensor.requires_grad_() for tensor in make((3, 4), (3, 1), 5)]
    assert torch.autograd.gradcheck(e3k.gated_residual, inputs)


def test_opcheck(backend):
    inputs = [tensor.requires_grad_() for tensor in make((3, 4), (3, 1), 6, torch.float32)]
    opcheck(getattr(torch.ops.e3.gated_residual, backend), inputs)


def test_double_backward_raises(backend):
    h, f, m = (tensor.requires_grad_() for tensor in make((3, 4), (), 7, torch.float32))
    factor = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad((factor * e3k.gated_residual(h, f, m)).sum(), m, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.backward()


def test_compiles_whole(backend, compiled_calls):
    h, f, m = (tensor.requires_grad_() for tensor in make((3, 4), (), 8, torch.float32))
    (out,), graphs = compiled_calls(lambda h, f, m: 2 * e3k.gated_residual(h, f, m), [(h, f, m)])
    assert graphs == 1
    expected = 2 * e3k.gated_residual(h, f, m)
    torch.testing.assert_close(out, expected)
    gradients = [torch.autograd.grad(value.sum(), (h, f, m)) for value in (out, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"branch_out": torch.zeros(3, 5)}, ValueError, r"branch_out has shape \(3, 5\); it must be \(3, 4\)"),
        ({"gate": torch.zeros(3)}, ValueError, r"gate has shape \(3,\); it must broadcast to hidden, \(3, 4\)"),
        ({"gate": torch.zeros(1, 3, 4)}, ValueError, r"gate has shape \(1, 3, 4\)"),
        ({"gate": torch.zeros((), device="meta")}, ValueError, "gate is on meta"),
        ({"branch_out": torch.zeros(3, 4).half()}, TypeError, r"branch_out has dtype torch\.float16"),
        ({"gate": torch.tensor(1)}, TypeError, r"gate has dtype torch\.int64"),
        ({"hidden": torch.zeros(3, 4).long()}, TypeError, r"hidden has dtype torch\.int64"),
    ],
)
def test_wrong_arguments_are_named(options, error, message):
    arguments = {"hidden": torch.zeros(3, 4), "branch_out": torch.zeros(3, 4), "gate": torch.zeros(())}
    with pytest.raises(error, match=message):
        e3k.gated_residual(**(arguments | options))
