import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import e3kernels as e3k

OPERATION = "entropy_kl"
INF = math.inf

OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.5, 1.0, 2.7]),
        "weighting": st.sampled_from(["none", "entropy", "inverse", "mix"]),
        "gamma": st.sampled_from([0.0, 1.0, 2.5]),
        "kd_ratio": st.sampled_from([0.0, 0.3, 1.0]),
        "divergence": st.sampled_from(["forward", "reverse", "jsd", "adaptive"]),
        "beta": st.sampled_from([0.1, 0.5, 0.8]),
        "student_softcap": st.sampled_from([None, 5.0]),
        "teacher_softcap": st.sampled_from([None, 3.0]),
        "student_scale": st.sampled_from([1.0, 0.5]),
        "teacher_scale": st.sampled_from([1.0, 1.5]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
    }
).map(lambda options: options | ({"kd_ratio": 1.0} if options["weighting"] == "mix" else {}))
SHAPES = st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 17, 130]), st.integers(0, 10**6))


def make(rows, vocabulary, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.2] = -100
    mask = torch.rand(rows, generator=generator) < 0.8
    mask[0], labels[0] = True, 0
    return student.to(dtype), teacher.to(dtype), labels, mask


@given(shape=SHAPES, options=OPTIONS, masked=st.booleans())
def test_equals_the_textbook_in_fp64(naive_entropy_kl, with_gradients, shape, options, masked):
    student, teacher, labels, mask = make(*shape)
    options["token_mask"] = mask if masked else None
    ours = with_gradients(lambda z: e3k.entropy_kl(z, teacher, labels, **options), [student], 1)
    naive = with_gradients(lambda z: naive_entropy_kl(z, teacher, labels, **options), [student], 1)
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)


@given(shape=SHAPES, options=OPTIONS)
def test_error_is_no_worse_than_naive(
    backend, dtype, naive_entropy_kl, with_gradients, assert_no_worse, shape, options
):
    student, teacher, labels, mask = make(*shape, dtype)
    options["token_mask"] = mask
    inputs = [student]
    ours = with_gradients(lambda z: e3k.entropy_kl(z, teacher, labels, **options), inputs, 1)
    naive = with_gradients(lambda z: naive_entropy_kl(z, teacher, labels, **options), inputs, 1)
    with e3k.use_backend("reference"):
        exact = with_gradients(lambda z: e3k.entropy_kl(z, teacher.double(), labels, **options), [student.double()], 1)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours[1].dtype == dtype
    assert_no_worse(ours, naive, exact, dtype)


@pytest.mark.parametrize("vocabulary", [1000, 5003])
def test_long_rows(backend, dtype, naive_entropy_kl, with_gradients, assert_no_worse, vocabulary):
    student, teacher, labels, _ = make(7, vocabulary, 3, dtype)
    call = partial(e3k.entropy_kl, kd_ratio=0.5, temperature=2.0)
    ours = with_gradients(lambda z: call(z, teacher, labels), [student], 1)
    naive = with_gradients(lambda z: naive_entropy_kl(z, teacher, labels, kd_ratio=0.5, temperature=2.0), [student], 1)
    with e3k.use_backend("reference"):
        exact = with_gradients(lambda z: call(z, teacher.double(), labels), [student.double()], 1)
    assert_no_worse(ours, naive, exact, dtype)


@given(seed=st.integers(0, 10**6), layout=st.sampled_from(["sliced", "transposed", "expanded", "batched"]))
def test_strides_and_leading_dimensions_do_not_matter(backend, seed, layout):
    student, teacher, labels, _ = make(6, 20, seed, torch.float32)
    if layout == "sliced":
        views = [torch.cat((x, torch.full_like(x, torch.nan)), -1)[:, :20] for x in (student, teacher)]
    elif layout == "transposed":
        views = [x.t().contiguous().t() for x in (student, teacher)]
    elif layout == "expanded":
        student, teacher = student[:1].repeat(6, 1), teacher[:1].repeat(6, 1)
        views = [x[:1].expand(6, 20) for x in (student, teacher)]
    else:
        views = [x.reshape(2, 3, 20) for x in (student, teacher)]
    tokens = labels.reshape(views[0].shape[:-1])
    expected = e3k.entropy_kl(student, teacher, labels, kd_ratio=0.5, reduction="none")
    actual = e3k.entropy_kl(*views, tokens, kd_ratio=0.5, reduction="none")
    assert torch.equal(actual, expected.reshape(tokens.shape))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "adaptive"])
@pytest.mark.parametrize("weighting", ["entropy", "mix"])
def test_gradcheck(reduction, divergence, weighting):
    student, teacher, labels, _ = make(4, 6, 1)
    options = {"temperature": 1.7, "student_softcap": 6.0, "student_scale": 0.8, "beta": 0.3}
    options |= {"kd_ratio": 1.0 if weighting == "mix" else 0.6}
    assert torch.autograd.gradcheck(
        lambda z: e3k.entropy_kl(
            z, teacher, labels, reduction=reduction, divergence=divergence, weighting=weighting, **options
        ),
        student.requires_grad_(),
    )


@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck(backend, reduction):
    student, teacher, labels, mask = make(3, 8, 2, torch.float32)
    scalars = torch.tensor([1.5, 1.0, 0.7, 0.5, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    arguments = (student.requires_grad_(), teacher, labels, mask, scalars, 1, 0, -100, reduction, None, reduction != 0)
    opcheck(getattr(torch.ops.e3.entropy_kl, backend), arguments)


def test_statistics(backend):
    student, teacher, labels, _ = make(6, 12, 5, torch.float32)
    shape = (2, 3)
    loss, stats = e3k.entropy_kl(
        student.reshape(2, 3, 12).requires_grad_(), teacher.reshape(2, 3, 12), labels.reshape(shape), return_stats=True
    )
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    valid = labels != -100
    entropy = -(log_p.exp() * log_p).sum(-1)
    expected = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "teacher_entropy": entropy,
        "cross_entropy": -log_q.gather(-1, labels.clamp(min=0)[:, None])[:, 0],
        "weight": 1 + entropy / math.log(12),
    }
    for name, value in expected.items():
        statistic = getattr(stats, name)
        assert statistic.dtype == torch.float32
        assert not statistic.requires_grad
        torch.testing.assert_close(statistic, (value * valid).reshape(shape), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.detach(), (stats.kl * stats.weight).sum() / stats.weight.sum())
    assert e3k.entropy_kl(student, teacher, return_stats=True)[1].cross_entropy is None


@pytest.mark.parametrize("num_items", [7, torch.tensor(7), torch.tensor(7.0)])
def test_num_items_replaces_the_sum_of_weights(backend, num_items):
    student, teacher, labels, _ = make(5, 9, 6, torch.float32)
    total = e3k.entropy_kl(student, teacher, labels, reduction="sum")
    mean = e3k.entropy_kl(student.requires_grad_(), teacher, labels, num_items=num_items)
    torch.testing.assert_close(mean.detach(), total / 7)
    mean.backward()
    copy = student.detach().requires_grad_()
    (e3k.entropy_kl(copy, teacher, labels, reduction="sum") / 7).backward()
    torch.testing.assert_close(student.grad, copy.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_valid_token_gives_zero_attached_to_the_graph(backend, reduction):
    student, teacher, labels, _ = make(4, 9, 7, torch.float32)
    student.requires_grad_()
    garbage = teacher * torch.nan
    loss = e3k.entropy_kl(student, garbage, torch.full_like(labels, -100), kd_ratio=0.5, reduction=reduction)
    assert loss.requires_grad
    loss.sum().backward()
    assert loss.eq(0).all()
    assert student.grad.eq(0).all()


@pytest.mark.parametrize("by", ["label", "mask"])
def test_garbage_on_masked_rows_changes_nothing(backend, by, with_gradients):
    student, teacher, labels, _ = make(5, 9, 8, torch.float32)
    labels = labels.clamp(min=0)
    out = torch.tensor([False, True, False, True, False])
    noise = torch.where(out[:, None], torch.nan, 0.0)
    arguments = {"labels": torch.where(out, -100, labels)} if by == "label" else {"labels": labels, "token_mask": ~out}
    dirty = arguments if by == "label" else arguments | {"labels": torch.where(out, 10**9, labels)}
    for reduction in ("mean", "none"):
        call = partial(e3k.entropy_kl, kd_ratio=0.5, reduction=reduction)
        clean = with_gradients(lambda z, call=call: call(z, teacher, **arguments), [student], 1)
        ours = with_gradients(lambda z, call=call: call(z, teacher + noise, **dirty), [student + noise], 1)
        for mine, expected in zip(ours, clean, strict=True):
            assert torch.equal(mine, expected)


def test_label_and_mask_must_both_hold(backend):
    student, teacher, _, _ = make(4, 9, 9, torch.float32)
    labels, mask = torch.tensor([1, -100, 2, -100]), torch.tensor([1, 1, 0, 0])
    stats = e3k.entropy_kl(student, teacher, labels, token_mask=mask, return_stats=True)[1]
    assert stats.weight.ne(0).tolist() == [True, False, False, False]


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])  # the adaptive one's α has log V
def test_vocabulary_masked_on_both_sides_equals_the_smaller_vocabulary(backend, divergence, with_gradients):
    student, teacher, _, _ = make(5, 9, 10, torch.float32)
    wide = [torch.cat((x, torch.full((5, 4), -INF)), -1) for x in (student, teacher)]
    call = partial(e3k.entropy_kl, divergence=divergence, weighting="none")
    ours = with_gradients(lambda z: call(z, wide[1]), wide[:1], 1)
    small = with_gradients(lambda z: call(z, teacher), [student], 1)
    torch.testing.assert_close(ours[0], small[0])
    torch.testing.assert_close(ours[1][:, :9], small[1])
    assert ours[1][:, 9:].eq(0).all()


def test_infinite_logits(backend):
    student, teacher, labels, _ = make(3, 6, 11, torch.float32)
    labels = torch.tensor([1, 2, 3])
    holes = teacher.clone()
    holes[:, 0] = -INF
    assert e3k.entropy_kl(student, holes, labels, kd_ratio=0.5).isfinite()
    student[1, 4] = -INF
    assert e3k.entropy_kl(student, holes, reduction="none").isinf().tolist() == [False, True, False]
    # The cross entropy of a label that the student excludes is +∞, and does not count where λ = 1.
    student, masked_teacher = student.clone(), teacher.clone()
    student[1, 4], student[0, 1], masked_teacher[0, 1] = 0.0, -INF, -INF
    assert e3k.entropy_kl(student, masked_teacher, labels, reduction="none").isfinite().all()
    mixed = e3k.entropy_kl(student, masked_teacher, labels, kd_ratio=0.5, reduction="none")
    assert mixed.isinf().tolist() == [True, False, False]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_in_gives_nan_out(backend, side):
    student, teacher, labels, _ = make(3, 6, 12, torch.float32)
    labels = labels.clamp(min=0)
    (student if side == "student" else teacher)[1, 2] = torch.nan
    student.requires_grad_()
    per_token = e3k.entropy_kl(student, teacher, labels, reduction="none")
    assert per_token.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(per_token, student, torch.tensor([1.0, 0.0, 1.0]))  # which 0 does not hide
    assert grad.isnan().all(1).tolist() == [False, True, False]
    loss = e3k.entropy_kl(student, teacher, labels)
    loss.backward()
    assert loss.isnan()
    assert student.grad[1].isnan().all()


def test_one_word_vocabulary(backend, with_gradients):
    student, teacher, _, _ = make(3, 1, 13, torch.float32)
    labels = torch.zeros(3, dtype=torch.long)
    for weighting in ("entropy", "inverse", "mix"):
        kd_ratio = 1.0 if weighting == "mix" else 0.5
        loss, grad = with_gradients(
            lambda z, w=weighting, r=kd_ratio: e3k.entropy_kl(z, teacher, labels, weighting=w, kd_ratio=r), [student], 1
        )
        assert loss == 0
        assert grad.eq(0).all()


def test_no_rows(backend, with_gradients):
    loss, grad = with_gradients(lambda z: e3k.entropy_kl(z, torch.zeros(0, 5)), [torch.zeros(0, 5)], 1)
    assert loss == 0
    assert grad.shape == (0, 5)


def test_identical_models_give_zero(backend, with_gradients):
    student, *_ = make(4, 300, 14, torch.float32)
    loss, grad = with_gradients(lambda z: e3k.entropy_kl(z, student), [student], 1)
    assert abs(loss) < 1e-6
    assert grad.abs().max() < 1e-7


def test_large_logits_do_not_overflow(backend, dtype):
    _, teacher, _, _ = make(4, 50, 15, torch.float32)
    big = 60000 if dtype == torch.float16 else 1e30
    shifted = torch.cat((teacher, torch.full((4, 1), big)), -1).to(dtype)
    loss = e3k.entropy_kl(shifted, shifted, reduction="none")
    assert loss.eq(0).all()


def test_gradient_flows_to_the_student_only(backend):
    student, teacher, _, _ = make(3, 6, 16, torch.float32)
    student.requires_grad_()
    teacher.requires_grad_()
    e3k.entropy_kl(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None
    with torch.no_grad():
        assert not e3k.entropy_kl(student, teacher).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(backend, reduction):
    student, teacher, _, _ = make(3, 6, 17, torch.float32)
    student.requires_grad_()
    factor = torch.ones((), requires_grad=True)
    loss = factor * e3k.entropy_kl(student, teacher, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_backward_twice_through_a_kept_graph(backend):
    student, teacher, _, _ = make(3, 6, 18, torch.float32)
    student.requires_grad_()
    loss = e3k.entropy_kl(student, teacher)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward()
    torch.testing.assert_close(student.grad, 2 * once)


def test_inference_mode_then_training(backend):
    student, teacher, _, _ = make(3, 6, 19, torch.float32)
    with torch.inference_mode():
        value = e3k.entropy_kl(student, teacher)
    trained = e3k.entropy_kl(student.requires_grad_(), teacher)
    trained.backward()
    assert torch.equal(value, trained.detach())


def test_activation_checkpointing(backend):
    from torch.utils.checkpoint import checkpoint

    student, teacher, _, _ = make(3, 6, 20, torch.float32)
    first, second = student.clone().requires_grad_(), student.clone().requires_grad_()
    e3k.entropy_kl(first * 2, teacher).backward()
    checkpoint(lambda z: e3k.entropy_kl(z * 2, teacher), second, use_reentrant=False).backward()
    assert torch.equal(first.grad, second.grad)


def test_autocast_takes_inputs_as_they_are(backend):
    student, teacher, _, _ = make(3, 6, 21, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = e3k.entropy_kl(student, teacher)
    assert torch.equal(inside, e3k.entropy_kl(student, teacher))


def test_compiles_whole_and_once_for_all_values_of_the_options(backend, compiled_calls):
    student, teacher, labels, _ = make(4, 9, 22, torch.float32)
    labels = labels.clamp(min=0)

    def function(z, temperature, gamma, kd_ratio, softcap, num_items):
        return e3k.entropy_kl(
            z, teacher, labels, temperature=temperature, gamma=gamma, kd_ratio=kd_ratio, student_softcap=softcap,
            num_items=num_items,
        )  # fmt: skip

    calls = [(student, 1.0 + i / 4, 0.5 * i + 0.1, 0.9 - i / 10, 20.0 + i, 5 + i) for i in range(6)]
    results, graphs = compiled_calls(function, calls)
    torch.testing.assert_close(results, [function(*call) for call in calls])
    assert graphs <= 2  # one with the first values as constants, one for all others


def test_compiled_gradient(backend, compiled_calls):
    student, teacher, _, _ = make(4, 9, 23, torch.float32)
    student.requires_grad_()
    (loss,), _ = compiled_calls(lambda z: 3 * e3k.entropy_kl(2 * z, teacher), [(student,)])
    (grad,) = torch.autograd.grad(loss, student)
    (expected,) = torch.autograd.grad(3 * e3k.entropy_kl(2 * student, teacher), student)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": INF}, "temperature is inf"),
        ({"gamma": -0.1}, "gamma is -0.1"),
        ({"kd_ratio": 1.1}, "kd_ratio is 1.1"),
        ({"kd_ratio": 0.5, "labels": None}, "labels is None"),
        ({"weighting": "mix", "labels": None}, "labels is None"),
        ({"weighting": "mix", "kd_ratio": 0.5}, "kd_ratio is 0.5"),
        ({"weighting": "huge"}, "weighting is 'huge'; choose one of none, entropy, inverse, mix"),
        ({"divergence": "backward"}, "divergence is 'backward'"),
        ({"divergence": "jsd", "beta": 1.0}, "beta is 1.0"),
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"reduction": "sum", "num_items": 3}, "num_items is given with reduction='sum'"),
        ({"num_items": 0}, "num_items is 0"),
        ({"num_items": torch.ones(2)}, r"num_items has shape \(2,\)"),
        ({"num_items": torch.tensor(-1)}, "num_items is -1; it must be finite, greater than 0"),
        ({"num_items": torch.tensor(0)}, "num_items is 0; it must be finite, greater than 0"),
        ({"num_items": torch.tensor(math.nan)}, "num_items is nan"),
        ({"num_items": torch.tensor(3, device="meta")}, "num_items is on meta; it must be on cpu"),
        ({"student_softcap": 0.0}, "student_softcap is 0.0"),
        ({"teacher_scale": INF}, "teacher_scale is inf"),
        ({"labels": torch.tensor([0, 6, -100])}, "labels holds 6; values must be at least 0 and less than 6"),
        ({"labels": torch.tensor([0, -1, 1])}, "labels holds -1"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, r"labels has shape \(4,\); it must be \(3,\)"),
        ({"token_mask": torch.ones(2, dtype=torch.bool)}, r"token_mask has shape \(2,\)"),
        ({"teacher_logits": torch.zeros(3, 7)}, r"teacher_logits has shape \(3, 7\); it must be \(3, 6\)"),
        ({"teacher_logits": torch.zeros(3, 6, device="meta")}, "teacher_logits is on meta; it must be on cpu"),
        ({"labels": torch.zeros(3, dtype=torch.long, device="meta")}, "labels is on meta"),
        ({"student_logits": torch.zeros(()), "teacher_logits": torch.zeros(())}, "student_logits is 0-dimensional"),
        ({"student_logits": torch.zeros(3, 0), "teacher_logits": torch.zeros(3, 0)}, "the vocabulary is empty"),
    ],
)
def test_wrong_values_are_named(options, message):
    arguments = {
        "student_logits": torch.zeros(3, 6),
        "teacher_logits": torch.zeros(3, 6),
        "labels": torch.zeros(3).long(),
    }
    with pytest.raises(ValueError, match=message):
        e3k.entropy_kl(**(arguments | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_logits": torch.zeros(3, 6).long()}, "student_logits has dtype torch.int64"),
        ({"teacher_logits": torch.zeros(3, 6).half()}, "teacher_logits has dtype torch.float16; .* torch.float32"),
        ({"labels": torch.zeros(3)}, "labels has dtype torch.float32"),
        ({"token_mask": torch.zeros(3)}, "token_mask has dtype torch.float32"),
        ({"num_items": torch.tensor(True)}, "num_items has dtype torch.bool"),
        ({"num_items": torch.tensor(1j)}, "num_items has dtype torch.complex64"),
    ],
)
def test_wrong_dtypes_are_named(options, message):
    arguments = {"student_logits": torch.zeros(3, 6), "teacher_logits": torch.zeros(3, 6)}
    with pytest.raises(TypeError, match=message):
        e3k.entropy_kl(**(arguments | options))


@pytest.mark.slow
def test_more_logits_than_32_bits_count(backend):
    if backend != "native":
        pytest.skip("the temporaries of the reference would take 80 GB, Triton's interpreter two hours")
    rows, vocabulary = 2**16, 2**15 + 8
    student, teacher = torch.randn(2, 1, vocabulary)
    last = e3k.entropy_kl(student, teacher, reduction="none")
    loss = e3k.entropy_kl(student.expand(rows, -1), teacher.expand(rows, -1), reduction="none")
    torch.testing.assert_close(loss, last.expand(rows))


def test_rows_may_lie_further_apart_than_32_bits_count(backend, with_gradients, rows_far_apart):
    student, teacher = torch.randn(2, 2, 70).bfloat16()
    labels = torch.tensor([3, 69])
    near, far = (
        with_gradients(lambda z, t=t: e3k.entropy_kl(z, t, labels, kd_ratio=0.5), [s], 1)
        for s, t in ((student, teacher), (rows_far_apart(student), rows_far_apart(teacher)))
    )
    assert all(map(torch.equal, near, far))
