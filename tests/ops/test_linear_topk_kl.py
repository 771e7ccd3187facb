import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn.functional import linear

import e3kernels as e3k
from e3kernels.backends import native_isa
from e3kernels.native import PRODUCTS

OPERATION = "linear_topk_kl"

OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1.0, 2.0]),
        "weighting": st.sampled_from(["none", "entropy", "inverse"]),
        "kd_ratio": st.sampled_from([0.3, 1.0]),
        "tail": st.sampled_from(["bucket", "renorm", "truncated"]),
        "student_softcap": st.sampled_from([None, 5.0]),
        "student_scale": st.sampled_from([1.0, 0.5]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
    }
)
SHAPES = st.tuples(st.integers(1, 9), st.sampled_from([(3, 2, 1), (17, 4, 5), (131, 8, 10)]), st.integers(0, 10**6))


def make(rows, sizes, seed, dtype=torch.float64):
    """Student (hidden, weight, bias), teacher (log-probabilities, ids), labels."""
    vocabulary, width, k = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, width), (vocabulary, width), (vocabulary,), (rows, vocabulary))
    *student, logits = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    logprobs, ids = (2 * logits).log_softmax(-1).topk(k)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.2] = -100
    labels[0] = 0
    return (
        [tensor.to(dtype) for tensor in student],
        (logprobs if dtype == torch.float64 else logprobs.float(), ids),
        labels,
    )


def fused(teacher, labels, **options):
    return lambda h, w, b: e3k.linear_topk_kl(h, w, *teacher, labels, student_bias=b, **options)


def materialised(loss, teacher, labels, **options):
    return lambda h, w, b: loss(linear(h, w, b), *teacher, labels, **options)


def extreme_head(dtype):
    """(hidden, weight) whose logits are the weight's columns: one word far above, a row far below, ties at the top."""
    weight = torch.randn(70, 3, generator=torch.Generator().manual_seed(12))
    weight[33, 0], weight[:, 1], weight[2:6, 2] = 1e38, -1e38, 1e38
    return torch.eye(3, dtype=dtype), weight.to(dtype)


@pytest.mark.parametrize("tail", ["bucket", "renorm", "truncated"])
@pytest.mark.parametrize("needed", [True, False])
def test_logits_at_the_ends_of_fp32_and_rows_of_other_lengths(backend, tail, needed):
    hidden, weight = extreme_head(torch.float32)
    logprobs, ids = torch.randn(3, 70, generator=torch.Generator().manual_seed(13)).log_softmax(-1).topk(9)
    logprobs[0, ::2], logprobs[2, 5:] = -torch.inf, -torch.inf
    ids[2, 5:] = ids[2, :4]  # padding with ids that the row stores
    options = {"tail": tail, "reduction": "none", "return_stats": True}
    with torch.set_grad_enabled(needed):
        weight.requires_grad_(needed)
        loss, stats = e3k.linear_topk_kl(hidden, weight, logprobs, ids, **options)
    with e3k.use_backend("reference"):
        logits = weight.detach().t().double().requires_grad_()
        exact, expected = e3k.topk_kl(logits, logprobs.double(), ids, **options)
    torch.testing.assert_close(loss.detach().double(), exact.detach(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(stats.weight.double(), expected.weight, rtol=1e-5, atol=1e-6)
    if needed:
        (grad,) = torch.autograd.grad(loss.sum(), weight)
        torch.testing.assert_close(grad.t().double(), torch.autograd.grad(exact.sum(), logits)[0], rtol=1e-4, atol=1e-5)


@given(shape=SHAPES, options=OPTIONS)
def test_equals_the_textbook_in_fp64(naive_topk_kl, with_gradients, shape, options):
    student, teacher, labels = make(*shape)
    ours = with_gradients(fused(teacher, labels, **options), student, 3)
    naive = with_gradients(materialised(naive_topk_kl, teacher, labels, **options), student, 3)
    torch.testing.assert_close(ours, naive, rtol=1e-8, atol=1e-8)


@given(shape=SHAPES, options=OPTIONS)
def test_error_is_no_worse_than_naive(backend, dtype, naive_topk_kl, with_gradients, assert_no_worse, shape, options):
    student, teacher, labels = make(*shape, dtype)
    ours = with_gradients(fused(teacher, labels, **options), student, 3)
    naive = with_gradients(materialised(naive_topk_kl, teacher, labels, **options), student, 3)
    wide = (teacher[0].double(), teacher[1])
    with e3k.use_backend("reference"):
        exact = with_gradients(fused(wide, labels, **options), [tensor.double() for tensor in student], 3)
    # Two are our own: of the tile's gradient, which a 16-bit product takes in, and of that product.
    assert_no_worse(ours, naive, exact, dtype, roundings=2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_tiles(backend, reduction, naive_topk_kl, with_gradients, assert_no_worse):
    if backend == "triton":
        pytest.skip("its tiles hold 64 Mi logits; test_triton_kernels.py makes them smaller")
    student, teacher, labels = make(44, (100_003, 4, 10), 1, torch.float32)
    options = {"reduction": reduction, "kd_ratio": 0.5}
    ours = with_gradients(fused(teacher, labels, **options), student, 3)
    whole = with_gradients(materialised(e3k.topk_kl, teacher, labels, **options), student, 3)
    # The oracle has no tiles. Some processors' fp32 products of 100,003 terms are themselves 1e-3 off.
    wide_student, wide_teacher = [tensor.double() for tensor in student], (teacher[0].double(), teacher[1])
    exact = with_gradients(materialised(naive_topk_kl, wide_teacher, labels, **options), wide_student, 3)
    assert_no_worse(ours, whole, exact, torch.float32)
    own = backend == "native" and native_isa() in PRODUCTS  # products that are not torch's
    expected = [tensor.float() for tensor in exact] if own else whole
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_autocast_multiplies_in_its_dtype(backend, with_gradients, assert_no_worse, naive_topk_kl):
    student, teacher, labels = make(40, (131, 32, 10), 2, torch.float32)

    def under_autocast(function):
        def call(*inputs):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(*inputs)

        return with_gradients(call, student, 3)

    ours = under_autocast(fused(teacher, labels, kd_ratio=0.7))
    naive = under_autocast(materialised(naive_topk_kl, teacher, labels, kd_ratio=0.7))
    with e3k.use_backend("reference"):
        wide = (teacher[0].double(), teacher[1])
        exact = with_gradients(fused(wide, labels, kd_ratio=0.7), [tensor.double() for tensor in student], 3)
    assert_no_worse(ours, naive, exact, torch.bfloat16)


def test_padding_and_masked_garbage_take_no_part(backend, with_gradients):
    student, (logprobs, ids), _ = make(5, (17, 4, 5), 3, torch.float32)
    mask = torch.tensor([True, False, True, True, False])
    expected = with_gradients(fused((logprobs, ids), None, token_mask=mask, weighting="none"), student, 3)
    padded = torch.cat((logprobs, torch.full((5, 2), -torch.inf)), -1)
    dirty = torch.where(mask[:, None], padded, torch.nan)
    dirty_ids = torch.where(mask[:, None], torch.cat((ids, torch.full((5, 2), -1)), -1), 10**9)
    ours = with_gradients(fused((dirty, dirty_ids), None, token_mask=mask, weighting="none"), student, 3)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_statistics_are_those_of_topk_kl(backend):
    student, teacher, labels = make(6, (12, 4, 3), 4, torch.float32)
    loss, stats = fused(teacher, labels, return_stats=True)(*student)
    expected_loss, expected = e3k.topk_kl(linear(*student), *teacher, labels, return_stats=True)
    torch.testing.assert_close((loss, *stats), (expected_loss, *expected), rtol=1e-5, atol=1e-5)


def test_only_the_hidden_states_need_a_gradient(backend):
    student, teacher, labels = make(6, (12, 4, 3), 5, torch.float32)
    student[0].requires_grad_()
    fused(teacher, labels)(*student).backward()
    assert student[0].grad.ne(0).any()
    assert student[1].grad is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_valid_token_gives_zero_attached_to_the_graph(backend, reduction, with_gradients):
    student, teacher, labels = make(6, (12, 4, 3), 6, torch.float32)
    results = with_gradients(fused(teacher, torch.full_like(labels, -100), reduction=reduction), student, 3)
    assert all(result.eq(0).all() for result in results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tail", ["bucket", "renorm", "truncated"])
def test_gradcheck(reduction, tail):
    student, teacher, labels = make(5, (9, 3, 4), 7)
    leaves = [tensor.requires_grad_() for tensor in student]
    assert torch.autograd.gradcheck(fused(teacher, labels, kd_ratio=0.6, reduction=reduction, tail=tail), leaves)


@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck(backend, reduction):
    student, teacher, labels = make(3, (8, 4, 3), 8, torch.float32)
    scalars = torch.tensor([1.5, 1.0, 0.7, 0.5, 0.0, 1.0], dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in student]
    arguments = (*leaves, *teacher, labels, None, scalars, 1, 0, -100, 0, None, reduction, None, *[reduction == 1] * 3)
    opcheck(getattr(torch.ops.e3.linear_topk_kl, backend), arguments)


def test_compiles_whole_and_once_for_all_values_of_the_options(backend, compiled_calls):
    student, teacher, labels = make(6, (12, 4, 3), 9, torch.float32)

    def function(temperature, gamma):
        return fused(teacher, labels, temperature=temperature, gamma=gamma)(*student)

    calls = [(1.0 + i / 4, 0.1 + i) for i in range(6)]
    results, graphs = compiled_calls(function, calls)
    torch.testing.assert_close(results, [function(*call) for call in calls])
    assert graphs <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_weight": torch.zeros(6, 5)}, r"student_weight has shape \(6, 5\); it must be \(6, 4\)"),
        ({"student_bias": torch.zeros(5)}, r"student_bias has shape \(5,\)"),
        ({"teacher_ids": torch.full((3, 2), 6)}, "teacher_ids holds 6"),
        ({"teacher_logprobs": torch.zeros(4, 2)}, r"teacher_logprobs has shape \(4, 2\); it must be \(3, 2\)"),
        ({"student_weight": torch.zeros(6, 4, device="meta")}, "student_weight is on meta"),
        ({"tail": "head"}, "tail is 'head'"),
    ],
)
def test_wrong_values_are_named(options, message):
    arguments = {
        "student_hidden": torch.zeros(3, 4),
        "student_weight": torch.zeros(6, 4),
        "teacher_logprobs": torch.zeros(3, 2),
        "teacher_ids": torch.zeros(3, 2).long(),
    }
    with pytest.raises(ValueError, match=message):
        e3k.linear_topk_kl(**(arguments | options))
