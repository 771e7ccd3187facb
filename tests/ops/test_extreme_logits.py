"""Logits at the ends of their dtype: while they are finite, so are loss and gradient, those of the oracle in fp64."""

import math
from functools import partial

import pytest
import torch

import e3kernels as e3k

OPERATION = "entropy_kl"
INF = math.inf
VOCABULARY, ROWS = 70, 2

# What the extremes are put on: the student's or the teacher's logits, and which of them; the others are ordinary.
LOW, HIGH, SOME, FIRST = slice(0, None), slice(33, 34), slice(5, 9), slice(0, 1)
KINDS = {
    "student low": [("student", LOW, -1)],
    "student one high": [("student", HIGH, 1)],
    "student first high": [("student", FIRST, 1)],
    "student some low": [("student", SOME, -1)],
    "student high above low": [("student", LOW, -1), ("student", HIGH, 1)],
    "teacher low": [("teacher", LOW, -1)],
    "teacher one high": [("teacher", HIGH, 1)],
    "teacher first high": [("teacher", FIRST, 1)],
    "teacher some low": [("teacher", SOME, -1)],
    "teacher high above low": [("teacher", LOW, -1), ("teacher", HIGH, 1)],
    "both low": [("student", LOW, -1), ("teacher", LOW, -1)],
    "ties at the top": [("student", slice(0, 4), 1), ("teacher", slice(2, 6), 1)],
}
OPTIONS = [
    {},
    {"temperature": 1.7, "kd_ratio": 0.5, "student_scale": 0.25, "teacher_scale": 0.25},
    {"student_softcap": 30.0, "student_scale": 4.0, "kd_ratio": 0.5},
    {"teacher_softcap": 30.0, "teacher_scale": 4.0, "temperature": 0.8, "student_scale": 0.25},
]


def make(kind, dtype, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(1)
    models = {name: torch.randn(ROWS, vocabulary, generator=generator) for name in ("student", "teacher")}
    for name, columns, sign in KINDS[kind]:
        models[name][:, columns] = sign * (6e4 if dtype == torch.float16 else 1e38)
    return models["student"].to(dtype), models["teacher"].to(dtype), torch.tensor([33, 7])


def oracle(function, student, with_gradients):
    """Value and gradient by the reference in fp64."""
    with e3k.use_backend("reference"):
        return with_gradients(function, [student.double()], 1)


def assert_equal_to(exact, ours, dtype):
    """Values to fp32's precision, gradients to that of their dtype."""
    rounding = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2e-5, atol=2e-5)
    for mine, truth in zip(ours[1:], exact[1:], strict=True):
        assert (mine.double() - truth).abs().max() <= rounding * max(1.0, truth.abs().max())


@pytest.mark.parametrize("divergence", ["forward", "reverse", "adaptive"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_is_the_textbook(naive_entropy_kl, with_gradients, kind, divergence):
    student, teacher, labels = make(kind, torch.float64)
    for options in OPTIONS:
        options = {"divergence": divergence, "reduction": "none"} | options
        ours = oracle(lambda z, o=options: e3k.entropy_kl(z, teacher, labels, **o), student, with_gradients)
        exact = with_gradients(lambda z, o=options: naive_entropy_kl(z, teacher, labels, **o), [student], 1)
        for mine, truth in zip(ours, exact, strict=True):
            assert (mine - truth).abs().max() <= 1e-9 * max(1.0, truth.abs().max())


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "adaptive"])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_logits_have_a_finite_loss(backend, dtype, with_gradients, kind, divergence):
    student, teacher, labels = make(kind, dtype)
    for options in OPTIONS:
        options = {"divergence": divergence, "beta": 0.3, "reduction": "none", "weighting": "none"} | options
        ours = with_gradients(lambda z, o=options: e3k.entropy_kl(z, teacher, labels, **o), [student], 1)
        exact = oracle(lambda z, o=options: e3k.entropy_kl(z, teacher.double(), labels, **o), student, with_gradients)
        assert_equal_to(exact, ours, dtype)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_they_may_stand_in_any_block(backend, reduction, with_gradients):
    """The same in rows of several blocks, where the first values say nothing about the rest."""
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(3, 5003, generator=generator) for _ in range(2))
    student[0, 4999], teacher[0, 3000] = 1e38, 1e38
    student[1, :4000], teacher[1, :300] = -1e38, -1e38
    student[2, 2048:4096], teacher[2, 2048:4096] = -1e38, -1e38
    labels = torch.tensor([4999, 4500, 17])
    options = {"kd_ratio": 0.5, "weighting": "none", "reduction": reduction}
    ours = with_gradients(lambda z: e3k.entropy_kl(z, teacher, labels, **options), [student], 1)
    exact = oracle(lambda z: e3k.entropy_kl(z, teacher.double(), labels, **options), student, with_gradients)
    assert_equal_to(exact, ours, torch.float32)


@pytest.mark.parametrize("hole", [-1e9, -1e38, torch.finfo(torch.float32).min])
def test_words_that_one_model_masks_by_a_large_number_and_the_other_by_infinity(backend, hole, with_gradients):
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, VOCABULARY, generator=generator) for _ in range(2))
    small = with_gradients(lambda z: e3k.entropy_kl(z, teacher[:, :60], weighting="none"), [student[:, :60]], 1)
    student[:, 60:], teacher[:, 60:] = -INF, hole
    wide = with_gradients(lambda z: e3k.entropy_kl(z, teacher, weighting="none"), [student], 1)
    torch.testing.assert_close(wide[0], small[0])
    torch.testing.assert_close(wide[1][:, :60], small[1])
    student[:, 60:], teacher[:, 60:] = hole, -INF
    call = partial(e3k.entropy_kl, divergence="reverse", weighting="none")
    torch.testing.assert_close(call(student, teacher), call(student[:, :60], teacher[:, :60]))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "adaptive"])
def test_a_teacher_that_does_not_count_may_hold_anything(backend, divergence, with_gradients):
    """λ = 0 with γ = 0, or no weights: 0·NaN and 0·∞ are 0."""
    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(3, VOCABULARY, generator=generator) for _ in range(2))
    labels = torch.tensor([1, 2, 3])
    hard = with_gradients(lambda z: torch.nn.functional.cross_entropy(z, labels), [student], 1)
    teacher[0, 5], teacher[1], teacher[2, 40:] = torch.nan, INF, -INF
    for options in ({"weighting": "none"}, {"gamma": 0.0}, {"gamma": 0.0, "weighting": "inverse"}):
        options |= {"kd_ratio": 0.0, "divergence": divergence}
        ours = with_gradients(lambda z, o=options: e3k.entropy_kl(z, teacher, labels, **o), [student], 1)
        torch.testing.assert_close(ours, hard)


def test_a_share_of_one_removes_an_infinite_cross_entropy(backend):
    """`mix` with H = log S: rounding must not leave (1 − r)·∞."""
    for vocabulary in range(2, 40):
        student, teacher = torch.zeros(1, vocabulary), torch.full((1, vocabulary), 0.3)
        stats = e3k.entropy_kl(student, teacher, torch.tensor([0]), weighting="mix", return_stats=True)[1]
        weight = e3k.entropy_kl(student, teacher, gamma=1.0, return_stats=True)[1].weight
        assert weight.item() <= 2.0
        assert stats.teacher_entropy.item() == pytest.approx(math.log(vocabulary), rel=1e-6)
        student[0, 0] = -INF
        loss = e3k.entropy_kl(student, teacher, torch.tensor([0]), weighting="mix")
        assert loss == INF  # by the divergence; never NaN or −∞


@pytest.mark.parametrize("beta", [1e-30, 1e-9, 1 - 1e-9])
def test_betas_next_to_the_ends(backend, beta, with_gradients, naive_entropy_kl):
    generator = torch.Generator().manual_seed(5)
    student, teacher = (3 * torch.randn(2, VOCABULARY, generator=generator) for _ in range(2))
    student[0, 3], teacher[1, 4] = -200.0, -200.0
    options = {"divergence": "jsd", "beta": beta, "weighting": "none", "reduction": "sum"}
    ours = with_gradients(lambda z: e3k.entropy_kl(z, teacher, **options), [student], 1)
    exact = with_gradients(lambda z: naive_entropy_kl(z, teacher.double(), **options), [student.double()], 1)
    for mine, truth in zip(ours, exact, strict=True):
        assert (mine.double() - truth).abs().max() < 1e-6
