"""The adaptive divergence: α·KL(p‖q) + (1 − α)·KL(q‖p) with α = H/log S of the teacher's token."""

import math
from functools import partial

import pytest
import torch

import e3kernels as e3k

OPERATION = "entropy_kl"
INF = math.inf
PLAIN = {"weighting": "none", "reduction": "none"}


def make(rows, vocabulary, seed, dtype=torch.float32):
    """Logits of a student and of a teacher from whom some tokens are nearly certain and some nearly uniform."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, vocabulary, generator=generator) for _ in range(2))
    return (3 * student).to(dtype), (teacher * torch.linspace(0.1, 12, rows)[:, None]).to(dtype)


def blended(loss, student, support, with_gradients):
    """The parts with α from the statistics, put together: (per-token value, gradient)."""
    forward, reverse = (
        with_gradients(lambda z, kind=kind: loss(z, divergence=kind, **PLAIN), [student], 1)
        for kind in ("forward", "reverse")
    )
    entropy = loss(student, return_stats=True, **PLAIN)[1].teacher_entropy
    share = (entropy / math.log(support)).clamp(0, 1)
    value = share * forward[0] + (1 - share) * reverse[0]
    return value, share[:, None] * forward[1] + (1 - share[:, None]) * reverse[1]


@pytest.mark.parametrize("vocabulary", [19, 5003])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"student_softcap": 9.0, "teacher_scale": 0.5}], ids=str)
def test_it_is_both_parts_by_the_teachers_entropy(backend, with_gradients, vocabulary, options):
    student, teacher = make(8, vocabulary, 1)
    loss = partial(e3k.entropy_kl, teacher_logits=teacher, **options)
    ours = with_gradients(lambda z: loss(z, divergence="adaptive", **PLAIN), [student], 1)
    torch.testing.assert_close(ours, list(blended(loss, student, vocabulary, with_gradients)), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("tail", ["bucket", "renorm"])
def test_a_sparse_teachers_share_is_of_its_stored_ids(backend, with_gradients, tail):
    student, teacher = make(8, 40, 2)
    logprobs, ids = teacher.log_softmax(-1).topk(6)
    loss = partial(e3k.topk_kl, teacher_logprobs=logprobs, teacher_ids=ids, tail=tail)
    ours = with_gradients(lambda z: loss(z, divergence="adaptive", **PLAIN), [student], 1)
    torch.testing.assert_close(ours, list(blended(loss, student, 6, with_gradients)), rtol=2e-5, atol=2e-6)


def test_linear_losses_have_it(backend, with_gradients):
    generator = torch.Generator().manual_seed(3)
    hidden, weight, other = (torch.randn(shape, generator=generator) for shape in [(7, 6), (50, 6), (50, 6)])
    logprobs, ids = (hidden @ other.T).log_softmax(-1).topk(5)
    options = {"divergence": "adaptive", "gamma": 2.0}
    calls = {
        "dense": (
            lambda h, w: e3k.linear_entropy_kl(h, w, hidden, other, **options),
            lambda h, w: e3k.entropy_kl(h @ w.T, hidden @ other.T, **options),
        ),
        "sparse": (
            lambda h, w: e3k.linear_topk_kl(h, w, logprobs, ids, **options),
            lambda h, w: e3k.topk_kl(h @ w.T, logprobs, ids, **options),
        ),
    }
    for fused, plain in calls.values():
        ours, expected = (with_gradients(call, [hidden, weight], 2) for call in (fused, plain))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_certain_teacher_leaves_the_reverse_part_alone(backend, with_gradients):
    """H = 0: a student with mass elsewhere is +∞ away, and of one without, even the infinite forward part is gone."""
    student, teacher = torch.zeros(2, 5), torch.full((2, 5), -INF)
    teacher[:, 2] = 0.0
    student[1] = teacher[1]
    call = partial(e3k.entropy_kl, divergence="adaptive", **PLAIN)
    assert call(student, teacher).tolist() == [INF, 0.0]
    loss, grad = with_gradients(lambda z: call(z, teacher[1:]), [student[1:]], 1)
    assert loss.eq(0).all()
    assert grad.eq(0).all()
    assert call(torch.randn(3, 1), torch.randn(3, 1)).eq(0).all()  # one word: S = 1


def test_words_that_the_teacher_excludes(backend):
    """+∞ where the student has mass on them; nothing where neither has."""
    student, teacher = make(4, 30, 4)
    teacher[:, 20:] = -INF
    call = partial(e3k.entropy_kl, divergence="adaptive", **PLAIN)
    assert call(student, teacher).eq(INF).all()
    student[:, 20:] = -INF
    seen = student[:, :20], teacher[:, :20]
    forward, reverse = (e3k.entropy_kl(*seen, divergence=kind, **PLAIN) for kind in ("forward", "reverse"))
    share = e3k.entropy_kl(*seen, return_stats=True)[1].teacher_entropy / math.log(30)  # S stays the vocabulary
    torch.testing.assert_close(call(student, teacher), share * forward + (1 - share) * reverse, rtol=1e-5, atol=1e-6)
    assert (call(*seen) - call(student, teacher)).abs().max() > 1e-3  # the smaller vocabulary's α is another


def test_one_stored_id_leaves_the_reverse_part_alone(backend):
    """S = 1: α = 0, so that a student that excludes the stored id is as far as the bucket says, not +∞."""
    student = torch.zeros(1, 9)
    student[0, 3] = -INF
    call = partial(e3k.topk_kl, teacher_logprobs=torch.tensor([[-0.5]]), divergence="adaptive", **PLAIN)
    loss = call(student, teacher_ids=torch.tensor([[3]]))
    torch.testing.assert_close(loss, torch.tensor([-math.log(1 - math.exp(-0.5))]))
    assert call(student + 1, teacher_ids=torch.tensor([[4]]), tail="renorm") == 0


@pytest.mark.parametrize("divergence", ["reverse", "adaptive"])
def test_what_rounding_leaves_of_the_bucket_is_no_zero(backend, with_gradients, divergence):
    """Stored in 16 bits, or of a certain teacher, probabilities sum to 1 and more while other ids have some."""
    student, _ = make(3, 200, 5)
    probabilities = torch.tensor([[0.9, 0.1, 1e-7], [0.5, 0.3, 0.2], [1 - 1e-9, 1e-9, 1e-12]])
    logprobs = probabilities.log().half().float()
    ids = torch.tensor([[7, 9, 150]] * 3)
    assert logprobs.exp().sum(-1).ge(1 - 2.0**-24).any()
    call = partial(e3k.topk_kl, divergence=divergence, **PLAIN)
    ours = with_gradients(lambda z: call(z, logprobs, ids), [student], 1)
    with e3k.use_backend("reference"):
        exact = with_gradients(lambda z: call(z, logprobs.double(), ids), [student.double()], 1)
    assert ours[0].isfinite().all()
    assert ours[1].isfinite().all()
    # In fp32 the rest itself, 1 − Σp, has few digits, and so has its logarithm.
    torch.testing.assert_close([part.double() for part in ours], exact, rtol=5e-3, atol=5e-3)


def test_a_bucket_that_neither_has_is_none(backend):
    """All ids stored: no bucket; a student that excludes all others: nothing lies in it."""
    student = torch.zeros(1, 3)
    logprobs, ids = torch.tensor([[0.5, 0.25, 0.25]]).log() + 1e-6, torch.tensor([[0, 1, 2]])  # rounded up: no rest
    call = partial(e3k.topk_kl, divergence="adaptive", **PLAIN)
    loss = call(student, logprobs, ids)
    wide = torch.cat((student, torch.full((1, 4), -INF)), -1)
    torch.testing.assert_close(call(wide, logprobs, ids), loss)
