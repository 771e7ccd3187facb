import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import e3kernels as e3k
from e3kernels.contract import DIVERGENCES

OPERATION = "topk_kl"
INF = math.inf
TAILS = ("bucket", "renorm", "truncated")

OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.7, 1.0, 2.0]),
        "weighting": st.sampled_from(["none", "entropy", "inverse", "mix"]),
        "gamma": st.sampled_from([0.0, 1.0, 2.5]),
        "kd_ratio": st.sampled_from([0.0, 0.3, 1.0]),
        "divergence": st.sampled_from(["forward", "reverse", "jsd", "adaptive"]),
        "beta": st.sampled_from([0.1, 0.5, 0.8]),
        "tail": st.sampled_from(TAILS),
        "student_softcap": st.sampled_from([None, 5.0]),
        "student_scale": st.sampled_from([1.0, 0.5]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
    }
).map(
    lambda options: (
        options
        | ({"kd_ratio": 1.0} if options["weighting"] == "mix" else {})
        | ({"divergence": "forward"} if options["tail"] == "truncated" else {})
    )
)
SHAPES = st.tuples(st.integers(1, 9), st.sampled_from([(2, 1), (17, 1), (17, 5), (130, 10)]), st.integers(0, 10**6))


def make(rows, sizes, seed, dtype=torch.float64, temperature=1.0):
    vocabulary, k = sizes
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))
    logprobs, ids = (teacher / temperature).log_softmax(-1).topk(k)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.2] = -100
    labels[0] = 0
    return student.to(dtype), logprobs if dtype == torch.float64 else logprobs.float(), ids, labels


@given(shape=SHAPES, options=OPTIONS)
def test_equals_the_textbook_in_fp64(naive_topk_kl, with_gradients, shape, options):
    student, logprobs, ids, labels = make(*shape, temperature=options["temperature"])
    ours = with_gradients(lambda z: e3k.topk_kl(z, logprobs, ids, labels, **options), [student], 1)
    naive = with_gradients(lambda z: naive_topk_kl(z, logprobs, ids, labels, **options), [student], 1)
    torch.testing.assert_close(ours, naive, rtol=1e-8, atol=1e-8)


@given(shape=SHAPES, options=OPTIONS)
def test_error_is_no_worse_than_naive(backend, dtype, naive_topk_kl, with_gradients, assert_no_worse, shape, options):
    student, logprobs, ids, labels = make(*shape, dtype, temperature=options["temperature"])
    ours = with_gradients(lambda z: e3k.topk_kl(z, logprobs, ids, labels, **options), [student], 1)
    naive = with_gradients(lambda z: naive_topk_kl(z, logprobs, ids, labels, **options), [student], 1)
    with e3k.use_backend("reference"):
        exact = with_gradients(
            lambda z: e3k.topk_kl(z, logprobs.double(), ids, labels, **options), [student.double()], 1
        )
    assert_no_worse(ours, naive, exact, dtype)


@pytest.mark.parametrize("tail", TAILS)
def test_long_rows(backend, dtype, naive_topk_kl, with_gradients, assert_no_worse, tail):
    student, logprobs, ids, labels = make(7, (5003, 10), 3, dtype)
    options = {"tail": tail, "kd_ratio": 0.5}
    ours = with_gradients(lambda z: e3k.topk_kl(z, logprobs, ids, labels, **options), [student], 1)
    naive = with_gradients(lambda z: naive_topk_kl(z, logprobs, ids, labels, **options), [student], 1)
    with e3k.use_backend("reference"):
        exact = with_gradients(
            lambda z: e3k.topk_kl(z, logprobs.double(), ids, labels, **options), [student.double()], 1
        )
    assert_no_worse(ours, naive, exact, dtype)


@pytest.mark.parametrize("tail", ["bucket", "renorm"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "adaptive"])
def test_all_ids_stored_equals_the_dense_teacher(backend, tail, divergence, with_gradients):
    student, logprobs, ids, labels = make(6, (9, 9), 4, torch.float32)
    dense = torch.empty_like(logprobs).scatter_(-1, ids, logprobs)
    options = {"divergence": divergence, "kd_ratio": 0.5, "temperature": 1.0}
    ours = with_gradients(lambda z: e3k.topk_kl(z, logprobs, ids, labels, tail=tail, **options), [student], 1)
    expected = with_gradients(lambda z: e3k.entropy_kl(z, dense, labels, **options), [student], 1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("fill", [-1, 0, 10**9])
def test_padding_takes_no_part(backend, tail, fill, with_gradients):
    student, logprobs, ids, labels = make(6, (17, 5), 5, torch.float32)
    wide = torch.cat((logprobs, torch.full((6, 3), -INF)), -1), torch.cat((ids, torch.full((6, 3), fill)), -1)
    call = partial(e3k.topk_kl, tail=tail, weighting="none", kd_ratio=0.5, reduction="none")
    ours = with_gradients(lambda z: call(z, *wide, labels), [student], 1)
    expected = with_gradients(lambda z: call(z, logprobs, ids, labels), [student], 1)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_all_padding_gives_zero(backend, tail, with_gradients):
    student, logprobs, ids, _ = make(3, (17, 5), 6, torch.float32)
    empty = torch.full_like(logprobs, -INF)
    loss, grad = with_gradients(lambda z: e3k.topk_kl(z, empty, ids, tail=tail), [student], 1)
    assert abs(loss) < 1e-6
    assert grad.abs().max() < 1e-6


def test_entropy_of_the_stored_probabilities(backend):
    student, logprobs, ids, _ = make(5, (130, 10), 7, torch.float32)
    logprobs[0, 1:] = -INF
    for tail in TAILS:
        stats = e3k.topk_kl(student, logprobs, ids, tail=tail, return_stats=True)[1]
        entropy = torch.special.entr(logprobs.softmax(-1)).sum(-1)
        torch.testing.assert_close(stats.teacher_entropy, entropy)
        torch.testing.assert_close(stats.weight, 1 + entropy / math.log(10))
    single = e3k.topk_kl(student, logprobs[:, :1], ids[:, :1], return_stats=True)[1]
    assert single.teacher_entropy.eq(0).all()
    assert single.weight.eq(1).all()


def test_tail_of_almost_nothing_keeps_its_digits(backend):
    student = torch.zeros(1, 5)
    student[0, 0] = 40.0  # the tail has e^-40: 1 − Σq would round to 0
    loss = e3k.topk_kl(student, torch.tensor([[math.log(0.5)]]), torch.tensor([[0]]), weighting="none")
    assert loss.item() == pytest.approx(math.log(0.5) + 0.5 * (40 - math.log(4)), rel=1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_infinite_student_logits(backend, tail):
    student, logprobs, ids, _ = make(3, (9, 3), 8, torch.float32)
    student[0, ids[0, 1]] = -INF
    outside = next(i for i in range(9) if i not in ids[1].tolist())
    student[1, outside] = -INF
    loss = e3k.topk_kl(student, logprobs, ids, tail=tail, reduction="none")
    assert loss.isinf().tolist() == [True, False, False]


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("tail", TAILS)
def test_nan_in_gives_nan_out(backend, side, tail):
    student, logprobs, ids, _ = make(3, (9, 3), 9, torch.float32)
    (student if side == "student" else logprobs)[1] = torch.nan
    student.requires_grad_()
    loss = e3k.topk_kl(student, logprobs, ids, tail=tail, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    for hidden in (1.0, 0.0):  # an incoming gradient of 0 does not hide it
        (grad,) = torch.autograd.grad(loss, student, torch.tensor([1.0, hidden, 1.0]), retain_graph=True)
        assert grad.isnan().any(1).tolist() == [False, True, False]
        assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
def test_garbage_on_masked_rows_changes_nothing(backend, tail, with_gradients):
    student, logprobs, ids, _ = make(5, (17, 5), 10, torch.float32)
    mask = torch.tensor([True, False, True, False, True])
    noise = torch.where(mask, 0.0, torch.nan)[:, None]
    dirty_ids = torch.where(mask[:, None], ids, 10**9)
    call = partial(e3k.topk_kl, tail=tail, token_mask=mask)
    clean = with_gradients(lambda z: call(z, logprobs, ids), [student], 1)
    ours = with_gradients(lambda z: call(z, logprobs + noise, dirty_ids), [student + noise], 1)
    for mine, expected in zip(ours, clean, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("tail", TAILS)
def test_no_valid_token_gives_zero_attached_to_the_graph(backend, tail):
    student, logprobs, ids, labels = make(3, (9, 3), 11, torch.float32)
    student.requires_grad_()
    loss = e3k.topk_kl(student, logprobs, ids, torch.full_like(labels, -100), tail=tail, kd_ratio=0.5)
    loss.backward()
    assert loss == 0
    assert student.grad.eq(0).all()


def test_one_word_vocabulary(backend, with_gradients):
    zeros = torch.zeros(3, 1)
    for tail in TAILS:
        loss, grad = with_gradients(
            lambda z, tail=tail: e3k.topk_kl(z, zeros, torch.zeros(3, 1).long(), tail=tail), [zeros], 1
        )
        assert loss == 0
        assert grad.eq(0).all()


def test_teacher_dtypes_and_leading_dimensions(backend):
    student, logprobs, ids, labels = make(6, (17, 5), 12, torch.float32)
    expected = e3k.topk_kl(student, logprobs.half().float(), ids, labels, kd_ratio=0.5, reduction="none")
    actual = e3k.topk_kl(
        student.reshape(2, 3, 17),
        logprobs.half().reshape(2, 3, 5),
        ids.int().reshape(2, 3, 5),
        labels.int().reshape(2, 3),
        kd_ratio=0.5,
        reduction="none",
    )
    assert torch.equal(actual, expected.reshape(2, 3))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("tail", "divergence"),
    [*itertools.product(TAILS[:2], DIVERGENCES), ("truncated", "forward")],
)
def test_gradcheck(reduction, tail, divergence):
    student, logprobs, ids, labels = make(4, (7, 3), 13)
    logprobs[1, 2] = -INF
    assert torch.autograd.gradcheck(
        lambda z: e3k.topk_kl(
            z,
            logprobs,
            ids,
            labels,
            tail=tail,
            divergence=divergence,
            reduction=reduction,
            kd_ratio=0.6,
            temperature=1.3,
            student_softcap=6.0,
            beta=0.3,
        ),
        student.requires_grad_(),
    )


@pytest.mark.parametrize("tail", [0, 1])
def test_opcheck(backend, tail):
    student, logprobs, ids, labels = make(3, (8, 3), 14, torch.float32)
    scalars = torch.tensor([1.5, 1.0, 0.7, 0.5, 0.0, 1.0], dtype=torch.float64)
    arguments = (student.requires_grad_(), logprobs, ids, labels, None, scalars, 1, 0, -100, tail, 1, None, True)
    opcheck(getattr(torch.ops.e3.topk_kl, backend), arguments)


def test_compiles_whole_and_once_for_all_values_of_the_options(backend, compiled_calls):
    student, logprobs, ids, _ = make(4, (17, 5), 15, torch.float32)

    def function(z, temperature, gamma):
        return e3k.topk_kl(z, logprobs, ids, temperature=temperature, gamma=gamma)

    calls = [(student, 1.0 + i / 4, 0.5 * i + 0.1) for i in range(6)]
    results, graphs = compiled_calls(function, calls)
    torch.testing.assert_close(results, [function(*call) for call in calls])
    assert graphs <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tail": "head"}, "tail is 'head'; choose one of bucket, renorm, truncated"),
        ({"tail": "truncated", "divergence": "jsd"}, "divergence is 'jsd'; tail='truncated' has 'forward' only"),
        ({"teacher_ids": torch.full((3, 2), 6)}, "teacher_ids holds 6"),
        ({"teacher_ids": torch.full((3, 2), -1)}, "teacher_ids holds -1"),
        ({"teacher_ids": torch.zeros(3, 1).long()}, r"teacher_ids has shape \(3, 1\); it must be \(3, 2\)"),
        ({"teacher_logprobs": torch.zeros(2, 2)}, r"teacher_logprobs has shape \(2, 2\); it must be \(3, 2\)"),
        ({"teacher_logprobs": torch.zeros(3, 0)}, "teacher_logprobs has k = 0"),
        ({"teacher_logprobs": torch.zeros(3, 7)}, "teacher_logprobs has k = 7; .* at most V = 6"),
        ({"teacher_ids": torch.zeros(3, 2, device="meta").long()}, "teacher_ids is on meta"),
        ({"temperature": -2.0}, "temperature is -2.0"),
        ({"kd_ratio": 0.5}, "labels is None"),
    ],
)
def test_wrong_values_are_named(options, message):
    arguments = {
        "student_logits": torch.zeros(3, 6),
        "teacher_logprobs": torch.zeros(3, 2),
        "teacher_ids": torch.zeros(3, 2).long(),
    }
    with pytest.raises(ValueError, match=message):
        e3k.topk_kl(**(arguments | options))


def test_rows_may_lie_further_apart_than_32_bits_count(backend, with_gradients, rows_far_apart):
    student = torch.randn(2, 70).bfloat16()
    logprobs, ids = torch.randn(2, 70).log_softmax(-1).topk(5)
    near, far = (
        with_gradients(lambda z: e3k.topk_kl(z, logprobs, ids), [s], 1) for s in (student, rows_far_apart(student))
    )
    assert all(map(torch.equal, near, far))


@pytest.mark.parametrize("name", ["teacher_logprobs", "teacher_ids"])
def test_wrong_dtypes_are_named(name):
    arguments = {"teacher_logprobs": torch.zeros(3, 2), "teacher_ids": torch.zeros(3, 2).long()}
    arguments[name] = arguments[name].bool()
    with pytest.raises(TypeError, match=f"{name} has dtype torch.bool"):
        e3k.topk_kl(torch.zeros(3, 6), **arguments)
