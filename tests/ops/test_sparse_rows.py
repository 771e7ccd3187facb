"""What a row of stored log-probabilities holds: padding, ids twice, ids that no vocabulary has; and extreme logits."""

import itertools
import math
from functools import partial

import pytest
import torch

import e3kernels as e3k
from e3kernels.contract import TAILS, WEIGHTINGS
from e3kernels.ops.common.arguments import checks_values

OPERATION = "topk_kl"
INF = math.inf
CASES = [
    (tail, divergence)
    for tail in TAILS
    for divergence in ("forward", "reverse", "jsd", "adaptive")
    if tail != "truncated" or divergence == "forward"
]


def make(rows, vocabulary, k, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))
    logprobs, ids = teacher.log_softmax(-1).topk(k)
    return student.to(dtype), logprobs, ids, torch.randint(vocabulary, (rows,), generator=generator)


def both(call, student, with_gradients):
    """[loss, gradient, statistics] of `call`, which returns the statistics too."""
    kept = []

    def loss(z):
        value, stats = call(z)
        kept[:] = stats
        return value

    return [*with_gradients(loss, [student], 1), *kept]


def spread(logprobs, ids, width, fill, seed):
    """The entries in their order, with padding before, between and behind them."""
    generator = torch.Generator().manual_seed(seed)
    rows, k = ids.shape
    at = torch.stack([torch.randperm(width, generator=generator)[:k].sort().values for _ in range(rows)])
    wide = torch.full((rows, width), -INF, dtype=logprobs.dtype).scatter_(1, at, logprobs)
    return wide, torch.full((rows, width), fill).scatter_(1, at, ids)


@pytest.mark.parametrize(("tail", "divergence"), CASES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_padding_changes_nothing(backend, dtype, tail, divergence, weighting, with_gradients):
    student, logprobs, ids, labels = make(4, 90, 5, 1, dtype)
    fill = int(ids[0, 2])  # an id that the first row stores behind its padding
    options = {"tail": tail, "divergence": divergence, "weighting": weighting, "return_stats": True}
    options |= {"kd_ratio": 1.0 if weighting == "mix" else 0.5}
    plain = both(lambda z: e3k.topk_kl(z, logprobs, ids, labels, **options), student, with_gradients)
    wide = spread(logprobs, ids, 65, fill, 2)
    padded = both(lambda z: e3k.topk_kl(z, *wide, labels, **options), student, with_gradients)
    torch.testing.assert_close(padded, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_rows_of_different_length_are_each_what_they_are_alone(backend, tail, with_gradients):
    student, logprobs, ids, labels = make(5, 17, 5, 3)
    lengths = [5, 3, 1, 0, 2]
    short = logprobs.clone()
    for row, length in enumerate(lengths):
        short[row, length:] = -INF
    options = {"tail": tail, "kd_ratio": 0.5, "reduction": "none", "return_stats": True, "gamma": 2.0}
    loss, _, kl, entropy, hard, weight = both(
        lambda z: e3k.topk_kl(z, short, ids, labels, **options), student, with_gradients
    )
    for row, length in enumerate(lengths):
        if length == 0:
            assert (entropy[row], weight[row]) == (0, 1)
            assert kl[row].abs() < 1e-6
            continue
        one = slice(row, row + 1)
        alone, stats = e3k.topk_kl(student[one], logprobs[one, :length], ids[one, :length], labels[one], **options)
        together = loss[one], kl[one], entropy[one], hard[one], weight[one]
        torch.testing.assert_close(together, (alone, *stats), rtol=1e-6, atol=1e-6)
        assert weight[row].item() == pytest.approx(1 + 2 * entropy[row].item() / math.log(max(length, 2)), rel=1e-5)


def test_the_share_is_that_of_the_stored_entries(backend):
    """Equal probabilities have r = 1 however many slots a row has."""
    ids = torch.arange(8).expand(3, 8)
    logprobs = torch.full((3, 8), math.log(0.1))
    logprobs[1, 4:] = logprobs[2, 1:] = -INF
    stats = e3k.topk_kl(torch.zeros(3, 20), logprobs, ids, return_stats=True)[1]
    torch.testing.assert_close(stats.weight, torch.tensor([2.0, 2.0, 1.0]))


def operator(backend, student, logprobs, ids, labels, tail, divergence):
    """(loss, statistics, gradients of sum and of single tokens) below the public function's checks."""
    scalars = torch.tensor([1.3, 1.0, 0.7, 0.4, 0.0, 1.0], dtype=torch.float64)
    codes = (1, ("forward", "reverse", "jsd", "adaptive").index(divergence), -100, TAILS.index(tail))
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    inputs = (student, logprobs.to(wide), ids, labels, None)
    kernel = getattr(torch.ops.e3.topk_kl, backend)
    loss, stats, gradient = kernel(*inputs, scalars, *codes, 2, None, True)
    incoming = torch.linspace(-1, 1, len(ids), dtype=loss.dtype)
    return loss, stats, gradient, getattr(torch.ops.e3.topk_kl_backward, backend)(incoming, *inputs, scalars, *codes)


@pytest.mark.parametrize(("tail", "divergence"), CASES)
def test_of_an_id_twice_in_a_row_the_first_counts(backend, dtype, tail, divergence):
    student, logprobs, ids, labels = make(4, 40, 7, 5, dtype)
    ids[0, 4], ids[1, 1], ids[2, 3], ids[2, 6] = ids[0, 1], ids[1, 0], ids[2, 0], ids[2, 0]
    labels[0] = ids[0, 1]
    once = logprobs.clone()
    once[0, 4] = once[1, 1] = once[2, 3] = once[2, 6] = -INF
    ids[3, 5], logprobs[3, 2], once[3, 2] = ids[3, 2], -INF, -INF  # of padding and an entry with its id, the entry
    twice = operator(backend, student, logprobs, ids, labels, tail, divergence)
    expected = operator(backend, student, once, ids, labels, tail, divergence)
    torch.testing.assert_close(twice, expected, rtol=1e-6, atol=1e-6)


def test_an_id_twice_in_a_row_is_an_error_where_it_can_be_seen(backend):
    student, logprobs, ids, _ = make(3, 20, 4, 6)
    ids[1, 3] = ids[1, 0]
    twice = int(ids[1, 0])
    with pytest.raises(ValueError, match=f"teacher_ids holds {twice} twice in row 1; .* distinct, or padding"):
        e3k.topk_kl(student, logprobs, ids)
    with pytest.raises(ValueError, match=f"teacher_ids holds {twice} twice in row 1"):
        e3k.linear_topk_kl(torch.zeros(3, 4), torch.zeros(20, 4), logprobs, ids)
    logprobs[1, 3] = -INF
    assert e3k.topk_kl(student, logprobs, ids).isfinite()
    logprobs[1, 3], ids[1, 3] = -1.0, ids[1, 0]
    assert e3k.topk_kl(student, logprobs, ids, token_mask=torch.tensor([1, 0, 1])).isfinite()


@pytest.mark.parametrize(("tail", "divergence"), CASES)
@pytest.mark.parametrize("outside", [-1, 40, 45, 2**31, -(2**40)])
def test_ids_out_of_range_take_no_part_and_write_nowhere(backend, tail, divergence, outside):
    student, logprobs, ids, labels = make(3, 40, 5, 7)
    once = logprobs.clone()
    once[:, 2] = -INF
    ids[:, 2] = outside
    if backend == "native":
        with pytest.raises(RuntimeError, match=rf"teacher_ids must lie in \[0, 40\), has {outside}"):
            operator(backend, student, logprobs, ids, labels, tail, divergence)
        return
    ours = operator(backend, student, logprobs, ids, labels, tail, divergence)
    expected = operator(backend, student, once, ids, labels, tail, divergence)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_values_are_checked_on_the_cpu_and_where_the_switch_asks(monkeypatch):
    monkeypatch.delenv("E3_CHECK_VALUES", raising=False)
    assert checks_values(torch.device("cpu"))
    assert not checks_values(torch.device("cuda"))
    monkeypatch.setenv("E3_CHECK_VALUES", "1")
    assert checks_values(torch.device("cuda"))


BIG = 1e38
EXTREMES = {
    "low": lambda z: z.fill_(-BIG),
    "one stored high": lambda z: z[:, 4].fill_(BIG),
    "one other high": lambda z: z[:, 33].fill_(BIG),
    "first high": lambda z: z[:, 0].fill_(BIG),
    "some low": lambda z: z[:, 3:9].fill_(-BIG),
    "high above low": lambda z: z.fill_(-BIG)[:, 33].fill_(BIG),
    "ties at the top": lambda z: z[:, 2:6].fill_(BIG),
    "a peak among the stored": lambda z: z[:, 4].fill_(200.0),
    "a peak among the others": lambda z: z[:, 33].fill_(200.0),
    "the others far below": lambda z: z[:, 20:].sub_(3e4),
    "stored far below": lambda z: z[:, :20].sub_(3e4),
}


@pytest.mark.parametrize(("tail", "divergence"), CASES)
@pytest.mark.parametrize("kind", EXTREMES)
def test_finite_logits_have_a_finite_loss(backend, kind, tail, divergence, with_gradients):
    student, logprobs, _, _ = make(2, 70, 10, 8)
    EXTREMES[kind](student)
    ids, labels = torch.arange(0, 20, 2).expand(2, 10).contiguous(), torch.tensor([33, 4])
    for temperature, hard in itertools.product((1.0, 2.0), (labels, None)):
        options = {"tail": tail, "divergence": divergence, "beta": 0.3, "temperature": temperature, "weighting": "none"}
        options |= {"student_scale": 0.25 if temperature > 1 else 1.0, "kd_ratio": 1.0 if hard is None else 0.5}

        def call(z, options=options, hard=hard):
            return e3k.topk_kl(z, logprobs.to(z.dtype), ids, hard, reduction="none", **options)

        ours = with_gradients(call, [student], 1)
        with e3k.use_backend("reference"):
            exact = with_gradients(call, [student.double()], 1)
        assert exact[0].isfinite().all()
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=2e-5, atol=2e-5)
        error = (ours[1].double() - exact[1]).abs().max()
        assert error <= 1e-4 * max(1.0, exact[1].abs().max())


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "adaptive"])
def test_all_others_excluded(backend, divergence):
    """The tail has mass under the teacher and none under the student; there is none if all ids are stored."""
    student, logprobs, ids, _ = make(1, 9, 4, 10)
    call = partial(e3k.topk_kl, divergence=divergence, weighting="none")
    excluded = torch.full_like(student, -INF).scatter(1, ids, student.gather(1, ids))
    loss = call(excluded, logprobs, ids)
    assert loss == INF if divergence in ("forward", "adaptive") else 0 < loss < INF
    assert call(student.gather(1, ids), logprobs, torch.arange(4)[None]).isfinite()


def events(student, logprobs, ids, tail):
    """The logits of both models' events, for ids that all rows share: a dense problem."""
    top, others = student.detach().amax(-1, True), student.index_fill(1, ids[0], -INF)
    stored = student[:, ids[0]]
    if tail == "renorm":
        return stored, logprobs
    highest = others.detach().amax(-1, True)
    others = (highest - top) + (others - highest).logsumexp(-1, keepdim=True)
    return torch.cat((stored - top, others), -1), torch.cat((logprobs, torch.log1p(-logprobs.exp().sum(-1, True))), -1)


@pytest.mark.parametrize("tail", ["bucket", "renorm"])
@pytest.mark.parametrize("kind", EXTREMES)
def test_the_oracle_is_the_textbook_of_the_events(naive_entropy_kl, with_gradients, tail, kind):
    student, logprobs, _, _ = make(2, 70, 10, 8, torch.float64)
    EXTREMES[kind](student)
    logprobs, ids = logprobs.double(), torch.arange(0, 20, 2).expand(2, 10).contiguous()
    options = {"weighting": "none", "reduction": "none"}
    ours = with_gradients(lambda z: e3k.topk_kl(z, logprobs, ids, tail=tail, **options), [student], 1)
    exact = with_gradients(lambda z: naive_entropy_kl(*events(z, logprobs, ids, tail), **options), [student], 1)
    for mine, truth in zip(ours, exact, strict=True):
        assert (mine - truth).abs().max() <= 1e-9 * max(1.0, truth.abs().max())


@pytest.mark.parametrize("tail", TAILS)
def test_a_teacher_that_does_not_count_may_hold_anything(backend, tail, with_gradients):
    """λ = 0 with γ = 0, or no weights: 0·NaN and 0·∞ are 0."""
    student, logprobs, ids, labels = make(3, 30, 5, 9)
    hard = with_gradients(lambda z: torch.nn.functional.cross_entropy(z, labels), [student], 1)
    logprobs[0], logprobs[1, 2], logprobs[2, 1] = torch.nan, INF, 80.0
    for options in ({"weighting": "none"}, {"gamma": 0.0}, {"gamma": 0.0, "weighting": "inverse"}):
        options |= {"kd_ratio": 0.0, "tail": tail}
        ours = with_gradients(lambda z, o=options: e3k.topk_kl(z, logprobs, ids, labels, **o), [student], 1)
        torch.testing.assert_close(ours, hard)
