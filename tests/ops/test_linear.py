from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from e3kernels.contract import REDUCTIONS
from e3kernels.reference import linear_entropy_kl as definition
from e3kernels.reference.entropy_kl import entropy_kl, entropy_kl_backward
from e3kernels.tiled import linear
from e3kernels.tiled.linear import TileKernel
from e3kernels.tiled.linear_entropy_kl import linear_loss

SCALARS = torch.tensor([1.5, 1.0, 0.7, 0.5, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)


def arguments(dtype, compute_dtype, width):
    generator = torch.Generator().manual_seed(1)
    shapes = ((11, width), (23, width), (23,), (11, 5), (23, 5), (23,))
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    labels = torch.arange(11)
    labels[3] = -100
    return (*tensors, labels, None, SCALARS, 1, 0, -100, compute_dtype)


def run(kernel, dtype, compute_dtype, reduction, needs=(True, True, True), width=6):
    forward, backward = linear.kernels(linear_loss, kernel)
    inputs = arguments(dtype, compute_dtype, width)
    code = REDUCTIONS.index(reduction)
    loss, stats, *gradients = forward(*inputs, code, None, *needs)
    if reduction == "none":
        gradients = backward(torch.linspace(-1, 1, 11, dtype=loss.dtype), *inputs, *needs)
    return [loss, stats, *gradients]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("dtype", "compute_dtype"), [(torch.float64, None), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("block_bytes", [1, 300, 1 << 20])
def test_tiles_and_blocks_do_not_matter(monkeypatch, reduction, dtype, compute_dtype, block_bytes):
    whole = run(TileKernel(entropy_kl, entropy_kl_backward, 1 << 20), dtype, compute_dtype, reduction)
    monkeypatch.setattr(linear, "_BLOCK_BYTES", block_bytes)
    for logits in (1, 23, 60, 200):
        tiled = run(TileKernel(entropy_kl, entropy_kl_backward, logits), dtype, compute_dtype, reduction)
        tolerance = 1e-12 if compute_dtype is None else 2.0**-7
        torch.testing.assert_close(tiled, whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_tiles_are_the_definition(reduction):
    *inputs, compute_dtype = arguments(torch.float64, None, 6)
    code = REDUCTIONS.index(reduction)
    ours = run(TileKernel(entropy_kl, entropy_kl_backward, 60), torch.float64, compute_dtype, reduction)
    torch.testing.assert_close(ours, [*definition.linear_entropy_kl(*inputs, code, None)], rtol=1e-12, atol=1e-12)


def test_no_tile_has_more_logits_than_the_kernel_allows():
    sizes = []

    def recording(student, teacher, *rest):
        sizes.append((student.numel(), teacher.numel()))
        return entropy_kl(student, teacher, *rest)

    run(TileKernel(recording, entropy_kl_backward, 60), torch.float32, None, "mean")
    assert sizes == [(46, 46)] * 5 + [(23, 23)]


def test_a_lean_kernel_takes_more_rows_of_a_narrow_dtype():
    kernel = TileKernel(entropy_kl, entropy_kl_backward, 1000)
    assert [kernel.rows(10, dtype) for dtype in (torch.float32, torch.bfloat16)] == [96, 96]
    kernel = kernel._replace(lean=True)
    assert [kernel.rows(10, dtype) for dtype in (torch.float32, torch.bfloat16)] == [96, 192]
    assert kernel.rows(5000, torch.float32) == 1


def in_place(student, *rest):
    """`entropy_kl` whose gradient replaces the student's logits, as the compiled tile kernel's does."""
    loss, stats, grad = entropy_kl(student, *rest)
    return loss, stats, student.copy_(grad) if grad.numel() else grad


def in_place_backward(grad_loss, student, *rest):
    return student.copy_(entropy_kl_backward(grad_loss, student, *rest))


def recording(sizes, kernel, student):
    """`kernel`, which notes the rows of the student's logits, its argument number `student`."""
    return lambda *inputs: sizes.append(len(inputs[student])) or kernel(*inputs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("dtype", "compute_dtype", "first"),
    [(torch.float64, None, 8), (torch.float32, torch.bfloat16, 11), (torch.bfloat16, None, 11)],
)
@pytest.mark.parametrize("block_bytes", [1, 300, 1 << 20])
def test_the_first_tile_lies_in_the_weight_gradient(monkeypatch, reduction, dtype, compute_dtype, first, block_bytes):
    tiles = []
    lean = TileKernel(recording(tiles, in_place, 0), recording(tiles, in_place_backward, 1), 23, lean=True)
    whole = run(TileKernel(entropy_kl, entropy_kl_backward, 1 << 20), dtype, compute_dtype, reduction, width=17)
    monkeypatch.setattr(linear, "_BLOCK_BYTES", block_bytes)
    lent = run(lean, dtype, compute_dtype, reduction, width=17)
    assert max(tiles) == first
    tolerance = 1e-12 if dtype == torch.float64 else 2.0**-7
    torch.testing.assert_close(lent, whole, rtol=tolerance, atol=tolerance)


def test_the_gradient_of_a_head_without_tokens_is_zero():
    head = linear.Head(torch.empty(0, 6), torch.randn(23, 6), None, torch.float32, linear.Products())
    _, weight, _ = linear.HeadGradients(head, (True, True, True)).results()
    assert weight.shape == (23, 6)
    assert not weight.any()


def test_a_frozen_model_asks_for_no_gradient_of_the_logits():
    asked = []

    def recording(*inputs):
        asked.append(inputs[-1])
        return entropy_kl(*inputs)

    kernel = TileKernel(recording, entropy_kl_backward, 1 << 20)
    *_, hidden, weight, bias = run(kernel, torch.float32, None, "mean", needs=(False, False, False))
    assert asked == [False]
    assert hidden.numel() == weight.numel() == bias.numel() == 0


def test_a_shared_head_is_multiplied_once(monkeypatch):
    products = []
    plain = linear.Head.project
    monkeypatch.setattr(
        linear.Head, "project", lambda head, hidden, out: products.append(hidden.shape) or plain(head, hidden, out)
    )
    inputs = list(arguments(torch.float32, None, 6))
    inputs[3:6] = [torch.randn(11, 6), inputs[1], inputs[2]]
    forward, _ = linear.kernels(linear_loss, TileKernel(entropy_kl, entropy_kl_backward, 1 << 20))
    forward(*inputs, 1, None, False, False, False)
    assert products == [(22, 6)]


class CudaProducts(TorchDispatchMode):
    """The products of CUDA tensors on those of this machine: `addmm` with an `out_dtype`, which sums without rounding.
    `calls` counts operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        keywords = keywords or {}
        self.calls[str(operator)] += 1
        if operator is not torch.ops.aten.addmm.dtype_out:
            return operator(*arguments, **keywords)
        total, first, second, dtype = arguments
        out, beta = keywords["out"], keywords.get("beta", 1)
        assert dtype == total.dtype == torch.float32
        assert first.dtype == second.dtype == torch.bfloat16
        product = first.to(dtype) @ second.to(dtype)
        return out.copy_(product if beta == 0 else product + beta * total)


@pytest.fixture
def cuda_products(monkeypatch):
    monkeypatch.setattr(linear, "adds_products", lambda narrow, total: True)
    with CudaProducts() as mode:
        yield mode


def big_head(rows, width, vocabulary):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=generator).bfloat16() for n in (rows, vocabulary))
    return hidden, weight, None, hidden, weight, None


def students_logits(student, teacher, *rest):
    """A dense kernel of no work, whose gradient is the student's logits."""
    return student.new_zeros((), dtype=torch.float32), student.new_zeros(4, len(student), dtype=torch.float32), student


def gradients_of(kernel, shape):
    inputs = (*big_head(*shape), None, None, SCALARS, 0, 0, -100, None)
    return linear_loss(kernel, (True, True, False), *inputs).forward(1, None)


def test_a_head_that_learns_takes_few_calls_where_products_add(cuda_products):
    """Llama 3's head and 8192 tokens, all sizes a sixteenth: tiles of 2048 rows, each with one product for the gradient
    of the weight, where tiles of 480 rows took 127 products each and two calls more to add every one of them."""
    gradients_of(TileKernel(students_logits, None, (64 << 20) // 256, added_rows=128), (512, 16, 8016))
    assert cuda_products.calls["aten.addmm.dtype_out"] == 4
    assert cuda_products.calls.total() < 110


def test_products_that_add_are_not_rounded(cuda_products):
    """What a narrow product rounds is 2^-9 of it; the sum of several tiles rounds 2^-24."""
    *_, weight, _ = gradients_of(TileKernel(students_logits, None, 64 * 300, added_rows=64), (256, 32, 300))
    hidden, head, *_ = big_head(256, 32, 300)
    exact = (hidden @ head.t()).double().t() @ hidden.double()
    assert (weight / 256 - exact / 256).abs().max() < 2e-6 * (exact / 256).abs().max()


def test_a_tile_is_shared_while_the_next_one_is_computed():
    """The sum over ranks of a tile's gradient: begun when it is there, awaited when the next one is, or at the end."""
    events = []

    def computing(*inputs):
        events.append("compute")
        return entropy_kl(*inputs)

    def share(hidden):
        events.append(f"begin {len(hidden)}")
        return lambda: events.append("finish") or hidden.mul_(2)

    alone = run(TileKernel(entropy_kl, entropy_kl_backward, 23 * 4), torch.float64, None, "mean")
    shared = run(TileKernel(computing, entropy_kl_backward, 23 * 4, share=share), torch.float64, None, "mean")
    assert events == [
        *("compute", "begin 4"), *("compute", "finish", "begin 4"), *("compute", "finish", "begin 3"), "finish",
    ]  # fmt: skip
    torch.testing.assert_close(shared[2], 2 * alone[2], rtol=1e-12, atol=0)
