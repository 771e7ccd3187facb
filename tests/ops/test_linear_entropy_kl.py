import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import e3kernels as e3k
from e3kernels.backends import native_isa
from e3kernels.native import PRODUCTS

OPERATION = "linear_entropy_kl"

OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1.0, 2.0]),
        "weighting": st.sampled_from(["none", "entropy", "inverse"]),
        "kd_ratio": st.sampled_from([0.3, 1.0]),
        "divergence": st.sampled_from(["forward", "reverse", "jsd", "adaptive"]),
        "student_softcap": st.sampled_from([None, 5.0]),
        "teacher_softcap": st.sampled_from([None, 3.0]),
        "student_scale": st.sampled_from([1.0, 0.5]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
    }
)
SHAPES = st.tuples(st.integers(1, 9), st.sampled_from([(1, 3, 2), (17, 4, 6), (131, 8, 5)]), st.integers(0, 10**6))


def make(rows, sizes, seed, dtype=torch.float64):
    """Student (hidden, weight, bias), teacher (hidden, weight, bias), labels."""
    vocabulary, *widths = sizes
    generator = torch.Generator().manual_seed(seed)

    def model(width):
        shapes = ((rows, width), (vocabulary, width), (vocabulary,))
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.2] = -100
    labels[0] = 0
    return model(widths[0]), model(widths[1]), labels


def fused(teacher, labels, **options):
    return lambda h, w, b: e3k.linear_entropy_kl(
        h, w, teacher[0], teacher[1], labels, student_bias=b, teacher_bias=teacher[2], **options
    )


def materialised(loss, teacher, labels, **options):
    logits = torch.nn.functional.linear(*teacher)
    return lambda h, w, b: loss(torch.nn.functional.linear(h, w, b), logits, labels, **options)


@given(shape=SHAPES, options=OPTIONS)
def test_equals_the_textbook_in_fp64(naive_entropy_kl, with_gradients, shape, options):
    student, teacher, labels = make(*shape)
    ours = with_gradients(fused(teacher, labels, **options), student, 3)
    naive = with_gradients(materialised(naive_entropy_kl, teacher, labels, **options), student, 3)
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)


@given(shape=SHAPES, options=OPTIONS)
def test_error_is_no_worse_than_naive(
    backend, dtype, naive_entropy_kl, with_gradients, assert_no_worse, shape, options
):
    student, teacher, labels = make(*shape, dtype)
    ours = with_gradients(fused(teacher, labels, **options), student, 3)
    naive = with_gradients(materialised(naive_entropy_kl, teacher, labels, **options), student, 3)
    wide_student, wide_teacher = ([tensor.double() for tensor in model] for model in (student, teacher))
    with e3k.use_backend("reference"):
        exact = with_gradients(fused(wide_teacher, labels, **options), wide_student, 3)
    # Two are our own: of the tile's gradient, which a 16-bit product takes in, and of that product.
    assert_no_worse(ours, naive, exact, dtype, roundings=2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_tiles(backend, reduction, naive_entropy_kl, with_gradients, assert_no_worse):
    if backend == "triton":
        pytest.skip("its tiles hold 64 Mi logits; test_triton_kernels.py makes them smaller")
    student, teacher, labels = make(44, (100_003, 4, 4), 1, torch.float32)
    options = {"reduction": reduction, "kd_ratio": 0.5}
    ours = with_gradients(fused(teacher, labels, **options), student, 3)
    whole = with_gradients(materialised(e3k.entropy_kl, teacher, labels, **options), student, 3)
    # The oracle has no tiles. Some processors' fp32 products of 100,003 terms are themselves 1e-3 off.
    wide_student, wide_teacher = [tensor.double() for tensor in student], [tensor.double() for tensor in teacher]
    exact = with_gradients(materialised(naive_entropy_kl, wide_teacher, labels, **options), wide_student, 3)
    assert_no_worse(ours, whole, exact, torch.float32)
    own = backend == "native" and native_isa() in PRODUCTS  # products that are not torch's
    expected = [tensor.float() for tensor in exact] if own else whole
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("with_bias", [True, False])
def test_shared_head(backend, dtype, with_bias, with_gradients):
    student, teacher, labels = make(7, (30, 5, 5), 2, dtype)
    bias = student[2] if with_bias else None

    def loss(hidden, weight, teacher_weight):
        return e3k.linear_entropy_kl(
            hidden, weight, teacher[0], teacher_weight, labels, student_bias=bias, teacher_bias=bias, kd_ratio=0.7
        )

    shared = with_gradients(lambda h, w: loss(h, w, w), student[:2], 2)
    apart = with_gradients(lambda h, w: loss(h, w, student[1].clone()), student[:2], 2)
    tolerance = 1e-5 if dtype in (torch.float64, torch.float32) else 2.0**-7
    torch.testing.assert_close(shared, apart, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_needed_gradients(backend, needed, reduction, with_gradients):
    student, teacher, labels = make(6, (12, 4, 3), 3, torch.float32)
    call = fused(teacher, labels, reduction=reduction)
    everything = with_gradients(call, student, 3)
    leaves = [tensor.clone().requires_grad_(need) for tensor, need in zip(student, needed, strict=True)]
    loss = call(*leaves)
    loss.backward(torch.linspace(-1, 1, 6) if reduction == "none" else None)
    for leaf, need, expected in zip(leaves, needed, everything[1:], strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, expected)


def test_frozen_student_has_no_graph(backend):
    student, teacher, labels = make(6, (12, 4, 3), 4, torch.float32)
    assert not fused(teacher, labels)(*student).requires_grad


def test_teacher_gets_no_gradient(backend):
    student, teacher, labels = make(6, (12, 4, 3), 5, torch.float32)
    teacher = [tensor.requires_grad_() for tensor in teacher]
    fused(teacher, labels)(*(tensor.requires_grad_() for tensor in student)).backward()
    assert all(tensor.grad is None for tensor in teacher)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_multiplies_in_its_dtype(backend, reduction, with_gradients, assert_no_worse, naive_entropy_kl):
    student, teacher, labels = make(40, (131, 32, 32), 6, torch.float32)
    options = {"reduction": reduction, "kd_ratio": 0.7}

    def under_autocast(function):
        def call(*inputs):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(*inputs)

        return with_gradients(call, student, 3)

    ours = under_autocast(fused(teacher, labels, **options))
    naive = under_autocast(materialised(naive_entropy_kl, teacher, labels, **options))
    wide_student, wide_teacher = ([tensor.double() for tensor in model] for model in (student, teacher))
    with e3k.use_backend("reference"):
        exact = with_gradients(fused(wide_teacher, labels, **options), wide_student, 3)
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 4
    assert_no_worse(ours, naive, exact, torch.bfloat16)
    assert not torch.equal(ours[1], with_gradients(fused(teacher, labels, **options), student, 3)[1])


def test_autocast_mixes_dtypes(backend):
    student, teacher, labels = make(6, (12, 4, 3), 7, torch.float32)
    teacher = [tensor.bfloat16() for tensor in teacher]
    with pytest.raises(TypeError, match=r"teacher_hidden has dtype torch\.bfloat16"):
        fused(teacher, labels)(*student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(teacher, labels)(*student).isfinite()


def test_statistics_are_those_of_entropy_kl(backend):
    student, teacher, labels = make(6, (12, 4, 3), 8, torch.float32)
    tokens = labels.reshape(2, 3)
    loss, stats = e3k.linear_entropy_kl(
        student[0].reshape(2, 3, 4), student[1], teacher[0].reshape(2, 3, 3), teacher[1], tokens, return_stats=True
    )
    logits = [model[0] @ model[1].t() for model in (student, teacher)]
    expected_loss, expected = e3k.entropy_kl(*(x.reshape(2, 3, 12) for x in logits), tokens, return_stats=True)
    torch.testing.assert_close((loss, *stats), (expected_loss, *expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_valid_token_gives_zero_attached_to_the_graph(backend, reduction, with_gradients):
    student, teacher, labels = make(6, (12, 4, 3), 9, torch.float32)
    garbage = [tensor * torch.nan for tensor in teacher]
    results = with_gradients(fused(garbage, torch.full_like(labels, -100), reduction=reduction), student, 3)
    assert all(result.eq(0).all() for result in results)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden_states_of_a_masked_token_may_hold_anything(backend, dtype, reduction, garbage, with_gradients):
    student, teacher, labels = make(6, (12, 4, 3), 9, dtype)
    labels = torch.arange(6)
    labels[2] = labels[4] = -100
    call = {"reduction": reduction, "kd_ratio": 0.5}
    clean = with_gradients(fused(teacher, labels, **call), student, 3)
    dirty = [student[0].clone(), *student[1:]], [teacher[0].clone(), *teacher[1:]]
    for hidden, *_ in dirty:
        hidden[2], hidden[4, 1] = garbage, -garbage
    ours = with_gradients(fused(dirty[1], labels, **call), dirty[0], 3)
    for mine, expected in zip(ours, clean, strict=True):
        assert torch.equal(mine, expected)


def extreme_head(dtype):
    """(hidden, weight) whose logits are the weight's columns: one word far above, a row far below, ties at the top."""
    weight = torch.randn(70, 3, generator=torch.Generator().manual_seed(12))
    weight[33, 0], weight[:, 1], weight[2:6, 2] = 1e38, -1e38, 1e38
    return torch.eye(3, dtype=dtype), weight.to(dtype)


@pytest.mark.parametrize("needed", [True, False])
def test_logits_at_the_ends_of_fp32(backend, needed):
    hidden, weight = extreme_head(torch.float32)
    teacher = torch.randn(70, 3, generator=torch.Generator().manual_seed(13))
    with torch.set_grad_enabled(needed):
        weight.requires_grad_(needed)
        loss = e3k.linear_entropy_kl(hidden, weight, hidden, teacher, weighting="none", reduction="none")
    with e3k.use_backend("reference"):
        logits = weight.detach().t().double().requires_grad_()
        exact = e3k.entropy_kl(logits, teacher.t().double(), weighting="none", reduction="none")
    torch.testing.assert_close(loss.detach().double(), exact.detach(), rtol=2e-5, atol=2e-5)
    if needed:
        (grad,) = torch.autograd.grad(loss.sum(), weight)
        torch.testing.assert_close(grad.t().double(), torch.autograd.grad(exact.sum(), logits)[0], rtol=1e-4, atol=1e-5)


def test_no_rows(backend, with_gradients):
    student, teacher, _ = make(1, (12, 4, 3), 10, torch.float32)
    empty = [student[0][:0], *student[1:]]
    results = with_gradients(fused([teacher[0][:0], *teacher[1:]], None), empty, 3)
    assert all(result.eq(0).all() for result in results)


def test_nan_in_gives_nan_out(backend, with_gradients):
    student, teacher, labels = make(3, (12, 4, 3), 11, torch.float32)
    student[0][1, 0] = torch.nan
    loss, grad_hidden, *_ = with_gradients(fused(teacher, labels.clamp(min=0), reduction="none"), student, 3)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad_hidden.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shared", [True, False])
def test_gradcheck(reduction, shared):
    student, teacher, labels = make(5, (9, 3, 3), 12)
    hidden, weight, bias = (tensor.requires_grad_() for tensor in student)
    options = {"kd_ratio": 0.6, "reduction": reduction}
    if shared:  # a shared weight gets the student's part of its gradient only, so the hidden states are checked
        call = fused((teacher[0], weight, bias), labels, **options)
        assert torch.autograd.gradcheck(lambda h: call(h, weight, bias), hidden)
    else:
        assert torch.autograd.gradcheck(fused(teacher, labels, **options), (hidden, weight, bias))


@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_opcheck(backend, reduction, compute_dtype):
    student, teacher, labels = make(3, (8, 4, 3), 13, torch.float32)
    scalars = torch.tensor([1.5, 1.0, 0.7, 0.5, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in student]
    arguments = (
        *leaves,
        *teacher,
        labels,
        None,
        scalars,
        1,
        0,
        -100,
        compute_dtype,
        reduction,
        None,
        *[reduction == 1] * 3,
    )
    opcheck(getattr(torch.ops.e3.linear_entropy_kl, backend), arguments)


def test_compiles_whole_and_once_for_all_values_of_the_options(backend, compiled_calls):
    student, teacher, labels = make(6, (12, 4, 3), 14, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in student]

    def function(temperature, kd_ratio):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fused(teacher, labels, temperature=temperature, kd_ratio=kd_ratio)(*leaves)

    calls = [(1.0 + i / 4, 0.9 - i / 10) for i in range(6)]
    results, graphs = compiled_calls(function, calls)
    torch.testing.assert_close(results, [function(*call) for call in calls])
    assert graphs <= 2
    gradients = [torch.autograd.grad(value, leaves) for value in (results[-1], function(*calls[-1]))]
    torch.testing.assert_close(*gradients)


def test_activation_checkpointing(backend):
    from torch.utils.checkpoint import checkpoint

    student, teacher, labels = make(6, (12, 4, 3), 15, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in student]
    plain = torch.autograd.grad(fused(teacher, labels)(*leaves), leaves)
    loss = checkpoint(fused(teacher, labels), *leaves, use_reentrant=False)
    assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(loss, leaves), plain, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_weight": torch.zeros(6, 5)}, r"student_weight has shape \(6, 5\); it must be \(6, 4\)"),
        ({"student_weight": torch.zeros(4)}, r"student_weight has shape \(4,\)"),
        ({"teacher_weight": torch.zeros(7, 4)}, r"teacher_weight has shape \(7, 4\); it must be \(6, 4\)"),
        ({"teacher_hidden": torch.zeros(2, 4)}, r"teacher_hidden has shape \(2, 4\); it must be \(3, 4\)"),
        ({"student_bias": torch.zeros(5)}, r"student_bias has shape \(5,\); it must be \(6,\)"),
        ({"teacher_bias": torch.zeros(6, 1)}, r"teacher_bias has shape \(6, 1\)"),
        ({"teacher_weight": torch.zeros(6, 4, device="meta")}, "teacher_weight is on meta"),
        ({"labels": torch.tensor([0, 1, 6])}, "labels holds 6"),
        ({"student_hidden": torch.zeros(())}, "student_hidden is 0-dimensional"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"teacher_softcap": -1.0}, "teacher_softcap is -1.0"),
    ],
)
def test_wrong_values_are_named(options, message):
    arguments = {
        "student_hidden": torch.zeros(3, 4),
        "student_weight": torch.zeros(6, 4),
        "teacher_hidden": torch.zeros(3, 4),
        "teacher_weight": torch.zeros(6, 4),
    }
    with pytest.raises(ValueError, match=message):
        e3k.linear_entropy_kl(**(arguments | options))


def test_fp16_logits_are_not_rounded_on_the_cpu(backend, naive_entropy_kl, with_gradients, assert_no_worse):
    generator = torch.Generator().manual_seed(0)
    hidden, other = (torch.randn(6, 64, generator=generator).half() for _ in range(2))
    weight, teacher = (torch.randn(2049, 64, generator=generator).mul(0.3).half() for _ in range(2))
    product = torch.nn.functional.linear
    wide, logits = (weight.double(), other.double(), teacher.double()), product(other, teacher)
    ours = with_gradients(lambda h: e3k.linear_entropy_kl(h, weight, other, teacher), [hidden], 1)
    naive = with_gradients(lambda h: naive_entropy_kl(product(h, weight), logits), [hidden], 1)
    with e3k.use_backend("reference"):
        exact = with_gradients(lambda h: e3k.linear_entropy_kl(h, *wide), [hidden.double()], 1)
    assert_no_worse(ours, naive, exact, torch.float16)
