"""topk_kl as Triton kernels: statistics of the ids not stored, tokens, dense gradient, stored gradient.

    statistics (row, split)   Σ e^u over the ids that are not stored (a difference of sums would cancel) and their C
    join       (rows)         for a vocabulary that ranks share: a rank's splits as one, before all gather theirs
    tokens     (rows)         the k + 1 (or k) events in fp64: divergence, entropy, loss, what the gradient needs
    gradient   (row, block)   ∂loss/∂x as if no id were stored: softmax(rest)·G, and the cross-entropy
    stored     (rows)         overwrites the gradient of the stored ids

With u = z/T, g = ∂D/∂log q over the events and q their student probabilities, a stored id i has ∂D/∂u = g_i − q_i·Σg,
any other G·e^{u − log rest} with G = g_tail − q_rest·Σg. `truncated` has no tail event; `renorm` has q over the k ids
and G = 0. An id that is not in the vocabulary takes no part, of an id twice in a row its first place does. Normalisers
travel as a maximum and the logarithm of a sum: added up, a maximum of 1e38 would swallow the second.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3kernels.compat import wrap_triton
from e3kernels.contract import REDUCTIONS, STORED_RESOLUTION
from e3kernels.reference.columns import WHOLE, Columns
from e3kernels.reference.token_loss import model_logits
from e3kernels.triton.launch import contiguous, joining, launch, odd, split_of, sweep_of, warps
from e3kernels.triton.reduction import reduced_loss
from e3kernels.triton.scalars import (
    BETA,
    STUDENT_SCALE,
    STUDENT_SOFTCAP,
    TEMPERATURE,
    cap_code,
    on_device,
    scalar,
    student_transform,
)
from e3kernels.triton.statistics import (
    ADAPTIVE,
    FORWARD,
    LOG2_E,
    LOWEST,
    REVERSE,
    STUDENT_FIELDS,
    Row,
    load_student,
    merge_student,
    row_from,
    scaled_logits,
    store_student,
)
from e3kernels.triton.sweeps.span import (
    edge_stop,
    edge_width,
    label_logit,
    load_tile,
    span_of,
    store_tile,
    sweep_zero,
    tile_of,
)
from e3kernels.triton.sweeps.unstored import sweep_unstored
from e3kernels.triton.tokens import entropy_share, is_valid, of_columns, weigh_tokens

BUCKET: tl.constexpr = tl.constexpr(0)
RENORM: tl.constexpr = tl.constexpr(1)
RESOLUTION: tl.constexpr = tl.constexpr(STORED_RESOLUTION)
NONE = REDUCTIONS.index("none")
ROWS = 1  # tokens of one program of the tokens and stored kernels: k² comparisons in fp64 fill its registers


class SparseTerms(NamedTuple):
    """What the gradient of one token's loss needs beside its logits and its stored ids' terms.

    Maximum and log S_s of the ids not stored, maximum and log-sum of all at T = 1, G, and the factors of the divergence
    and of the cross-entropy in the loss.
    """

    rest_top: tl.tensor
    rest_log: tl.tensor
    top: tl.tensor
    log_1: tl.tensor
    dense: tl.tensor
    kd: tl.tensor
    ce: tl.tensor


SPARSE_TERMS: tl.constexpr = tl.constexpr(len(SparseTerms._fields))


@triton.jit
def _load_terms(p, mask):
    return SparseTerms(
        tl.load(p, mask=mask), tl.load(p + 1, mask=mask), tl.load(p + 2, mask=mask), tl.load(p + 3, mask=mask),
        tl.load(p + 4, mask=mask), tl.load(p + 5, mask=mask), tl.load(p + 6, mask=mask),
    )  # fmt: skip


@triton.jit
def _store_terms(p, mask, terms):
    for i in tl.static_range(SPARSE_TERMS):
        tl.store(p + i, terms[i], mask=mask)


@triton.jit
def stored_ids(teacher_ptr, ids_ptr, row, valid, k, V, K: tl.constexpr):
    """(log p, ids, kept) of the stored entries, (rows, K): no padding, no id out of range, none of an invalid token."""
    columns = tl.arange(0, K)[None, :]
    inside = valid[:, None] & (columns < k)
    log_p = tl.load(teacher_ptr + row[:, None] * k + columns, mask=inside, other=float("-inf")).to(tl.float32)
    ids = tl.load(ids_ptr + row[:, None] * k + columns, mask=inside, other=0)
    kept = inside & (log_p != float("-inf")) & (ids >= 0) & (ids < V)
    return log_p, tl.where(kept, ids, 0), kept


@triton.jit
def topk_kl_statistics(
    student_ptr, teacher_ptr, ids_ptr, labels_ptr, mask_ptr, scalars_ptr, partial_ptr,
    student_stride, V, split_size, ignore_index, k,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, CAP: tl.constexpr, K: tl.constexpr, ODD: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if not is_valid(row, row >= 0, labels_ptr, mask_ptr, ignore_index, HAS_LABELS, HAS_MASK):
        return
    student = Row(student_ptr + row * student_stride, student_transform(scalars_ptr, CAP))
    first = split * split_size
    last = tl.minimum(first + split_size, V)
    columns = tl.arange(0, K)
    log_p = tl.load(teacher_ptr + row * k + columns, mask=columns < k, other=float("-inf"))
    ids = tl.load(ids_ptr + row * k + columns, mask=columns < k, other=0)
    ids = tl.where(log_p != float("-inf"), ids, V)
    rest = sweep_unstored(
        student, ids, first, last, V, 1.0 / scalar(scalars_ptr, TEMPERATURE), HAS_LABELS, ODD, LANES, VEC, UNROLL
    )
    y_label = label_logit(student, tl.load(labels_ptr + row), first, last) if HAS_LABELS else 0.0
    store_student(partial_ptr + (row * tl.num_programs(1) + split) * STUDENT_FIELDS, None, rest, y_label)


@triton.jit
def topk_kl_join(partial_ptr, scalars_ptr, joined_ptr, N, splits, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Join the splits of ROWS tokens to one."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    parts = tl.arange(0, SPLITS)[None, :]
    present = (row < N)[:, None] & (parts < splits)
    rest, y_label = load_student(partial_ptr + (row[:, None] * splits + parts) * STUDENT_FIELDS, present)
    rest = merge_student(rest, 1.0 / scalar(scalars_ptr, TEMPERATURE), 1)
    store_student(joined_ptr + row * STUDENT_FIELDS, row < N, rest, tl.sum(y_label, axis=1))


@triton.jit
def _log_sum(x, axis: tl.constexpr):
    """log Σ e^x in fp64 along `axis`, kept; −∞ where all are, NaN where one is."""
    top = tl.max(x, axis=axis, keep_dims=True)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log(tl.sum(tl.exp(x - top), axis=axis, keep_dims=True))


@triton.jit
def _log_softmax(y, inverse_temperature):
    """log softmax(y/T) of each row in fp64; −∞ where y is."""
    top = tl.max(y, axis=1, keep_dims=True)
    u = (y - tl.where(top == float("-inf"), 0.0, top)).to(tl.float64) * inverse_temperature
    return tl.where(y == float("-inf"), float("-inf"), u - _log_sum(u, 1))


@triton.jit
def _log_add(a, b):
    """log(e^a + e^b); −∞ where both are."""
    top = tl.maximum(a, b)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top))


@triton.jit
def _expected(p, value):
    return tl.where(p == 0.0, 0.0, p * value)


@triton.jit
def _event_terms(log_p, log_q, beta, alpha, DIVERGENCE: tl.constexpr):
    """(an event's part of D, its g) as in divergence.py of the reference; `alpha` is the adaptive one's."""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    if DIVERGENCE == FORWARD:
        return _expected(p, log_p - log_q), -p
    elif DIVERGENCE == REVERSE:
        terms = _expected(q, log_q - log_p)
        return terms, terms
    elif DIVERGENCE == ADAPTIVE:
        reverse = _expected(1.0 - alpha, _expected(q, log_q - log_p))
        return _expected(alpha, _expected(p, log_p - log_q)) + reverse, reverse - alpha * p
    else:
        log_m = _log_add(log_p + tl.log(beta), log_q + tl.log(1.0 - beta))
        terms = (1.0 - beta) * _expected(q, log_q - log_m)
        return beta * _expected(p, log_p - log_m) + terms, terms


@triton.jit
def _stored_logits(student_ptr, row, stride, ids, kept, scalars_ptr, CAP: tl.constexpr):
    """(logit at T = 1, ∂/∂x of it) of the stored ids; −∞ where none is kept."""
    x = tl.load(student_ptr + row[:, None] * stride + ids, mask=kept, other=0.0)
    y, slope = scaled_logits(x, student_transform(scalars_ptr, CAP))
    return tl.where(kept, y, float("-inf")), slope


@triton.jit
def topk_kl_tokens(
    student_ptr, teacher_ptr, ids_ptr, labels_ptr, mask_ptr, scalars_ptr, partial_ptr,
    stats_ptr, loss_ptr, terms_ptr, stored_ptr,
    N, student_stride, splits, k, V, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, DIVERGENCE: tl.constexpr, WEIGHTING: tl.constexpr,
    TAIL: tl.constexpr, CAP: tl.constexpr, GATHERED: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Join the splits of ROWS tokens with their stored ids; stored[row, i] is ∂D/∂u of stored id i.

    GATHERED: student_ptr holds the stored ids' logits at T = 1, (N, k), not rows of inputs.
    """
    temperature = scalar(scalars_ptr, TEMPERATURE)
    inverse_temperature = 1.0 / temperature
    beta = tl.load(scalars_ptr + BETA)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    valid = is_valid(row, inside, labels_ptr, mask_ptr, ignore_index, HAS_LABELS, HAS_MASK)
    parts = tl.arange(0, SPLITS)[None, :]
    present = valid[:, None] & (parts < splits)
    rest, y_label = load_student(partial_ptr + (row[:, None] * splits + parts) * STUDENT_FIELDS, present)
    y_label = tl.sum(y_label, axis=1)
    rest = merge_student(rest, inverse_temperature, 1)

    log_p, ids, kept = stored_ids(teacher_ptr, ids_ptr, row, valid, k, V, K)
    if GATHERED:
        at = student_ptr + row[:, None] * student_stride + tl.arange(0, K)[None, :]
        y = tl.load(at, mask=kept, other=float("-inf"))
    else:
        y, _ = _stored_logits(student_ptr, row, student_stride, ids, kept, scalars_ptr, CAP)
    same = (ids[:, :, None] == ids[:, None, :]) & kept[:, :, None] & kept[:, None, :]
    earlier = same & (tl.arange(0, K)[None, :, None] > tl.arange(0, K)[None, None, :])
    first = kept & (tl.max(earlier.to(tl.int32), axis=2) == 0)
    log_p = tl.where(first, log_p.to(tl.float64), float("-inf"))
    y = tl.where(first, y, float("-inf"))
    # Everything relative to the largest logit of the row, at T and at T = 1.
    top = tl.maximum(tl.where(rest.total == 0.0, LOWEST, rest.top), tl.max(y, axis=1))
    above = (rest.top - top).to(tl.float64)
    y_stored = (y - top[:, None]).to(tl.float64)
    log_rest = (above * inverse_temperature + tl.log(rest.total.to(tl.float64)))[:, None]
    log_z = _log_add(log_rest, _log_sum(y_stored * inverse_temperature, 1))
    log_1 = tl.log(rest.total_1.to(tl.float64) * tl.exp(above) + tl.sum(tl.exp(y_stored), axis=1)).to(tl.float32)

    log_total = _log_sum(log_p, 1)
    renormalised = tl.where(first, log_p - log_total, float("-inf"))
    entropy = -tl.sum(_expected(tl.exp(renormalised), renormalised), axis=1)
    support = tl.sum(first.to(tl.int32), axis=1)
    alpha = entropy_share(entropy, tl.log(support.to(tl.float64)))[:, None]
    if TAIL == RENORM:
        log_q = _log_softmax(y, inverse_temperature)
        shares, g = _event_terms(renormalised, log_q, beta, alpha, DIVERGENCE)
    else:
        log_q = tl.where(first, y_stored * inverse_temperature - log_z, float("-inf"))
        shares, g = _event_terms(log_p, log_q, beta, alpha, DIVERGENCE)
    divergence = tl.sum(shares, axis=1)
    total = tl.sum(g, axis=1)
    dense = tl.zeros([ROWS], tl.float64)
    if TAIL == BUCKET:
        mass = tl.maximum(1.0 - tl.exp(log_total), 0.0)
        if DIVERGENCE == REVERSE or DIVERGENCE == ADAPTIVE:
            mass = tl.where((log_rest > float("-inf")) & (mass < RESOLUTION), RESOLUTION, mass)
        mass = tl.where(support[:, None] == V, 0.0, mass)
        share, dense_g = _event_terms(tl.log(mass), log_rest - log_z, beta, alpha, DIVERGENCE)
        divergence += tl.sum(share, axis=1)
        dense = tl.sum(dense_g, axis=1)
        total += dense
    if TAIL != RENORM:
        dense -= tl.sum(tl.exp(log_rest - log_z), axis=1) * total
    slopes = tl.where(first, g - tl.exp(log_q) * total[:, None], 0.0)
    stored = tl.sum(tl.where(same, slopes[:, None, :], 0.0), axis=2)  # which all places of an id write
    entropy = entropy.to(tl.float32)
    divergence = divergence.to(tl.float32)
    cross_entropy = (top - y_label) + log_1 if HAS_LABELS else tl.zeros_like(entropy)
    kd, ce = weigh_tokens(
        stats_ptr, loss_ptr, row, N, valid, divergence, entropy, cross_entropy, tl.log(support.to(tl.float32)),
        temperature, scalars_ptr, WEIGHTING, HAS_LABELS,
    )  # fmt: skip
    terms = SparseTerms(rest.top, tl.log(rest.total), top, log_1, dense.to(tl.float32), kd, ce)
    _store_terms(terms_ptr + row * SPARSE_TERMS, valid, terms)
    columns = tl.arange(0, K)[None, :]
    tl.store(stored_ptr + row[:, None] * k + columns, stored.to(tl.float32), mask=valid[:, None] & (columns < k))


class Slopes(NamedTuple):
    """What a row's dense gradient needs: its terms, from logits at T = 1 to bits, the normalisers in bits, and the
    slopes of the divergence and of the cross-entropy."""

    terms: SparseTerms
    bits: tl.tensor
    rest_log: tl.tensor
    log_1: tl.tensor
    divergence: tl.tensor
    hard: tl.tensor


@triton.jit
def _load_slopes(p, incoming, inverse_temperature):
    terms = _load_terms(p, None)
    return Slopes(
        terms, inverse_temperature * LOG2_E, terms.rest_log * LOG2_E, terms.log_1 * LOG2_E,
        terms.kd * incoming * inverse_temperature, terms.ce * incoming,
    )  # fmt: skip


@triton.jit
def _dense_step(
    student, grad_row, start, span, slopes, label,
    TAIL: tl.constexpr, HAS_LABELS: tl.constexpr, MASKED: tl.constexpr, ODD: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a step as if no id were stored."""
    terms = slopes.terms
    for part in tl.static_range(UNROLL):
        first = start + part * LANES * VEC
        at, columns, inside = tile_of(student.ptr, first, span, MASKED, ODD, LANES, VEC)
        y, slope = scaled_logits(load_tile(at, inside, MASKED), student.transform)
        g = tl.zeros_like(y)
        if TAIL != RENORM:
            log_q = (y - terms.rest_top) * slopes.bits - slopes.rest_log
            g = terms.dense * tl.exp2(tl.minimum(log_q, 0.0))
            g = tl.where(terms.kd == 0.0, 0.0, g * slopes.divergence)
        if HAS_LABELS:
            hard = tl.exp2((y - terms.top) * LOG2_E - slopes.log_1) - tl.where(columns == label, 1.0, 0.0)
            g += tl.where(terms.ce == 0.0, 0.0, slopes.hard * hard)
        at, _, _ = tile_of(grad_row, first, span, MASKED, ODD, LANES, VEC)
        store_tile(at, (g * slope).to(grad_row.dtype.element_ty), inside, MASKED)


@triton.jit
def topk_kl_gradient(
    student_ptr, labels_ptr, mask_ptr, scalars_ptr, terms_ptr, incoming_ptr, grad_ptr,
    student_stride, incoming_stride, V, split_size, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, TAIL: tl.constexpr, CAP: tl.constexpr, ODD: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * split_size
    last = tl.minimum(first + split_size, V)
    grad_row = grad_ptr + row * V
    if not is_valid(row, row >= 0, labels_ptr, mask_ptr, ignore_index, HAS_LABELS, HAS_MASK):
        sweep_zero(grad_row, first, last, V, ODD, LANES, VEC, UNROLL)
        return
    student = Row(student_ptr + row * student_stride, student_transform(scalars_ptr, CAP))
    incoming = tl.load(incoming_ptr + row * incoming_stride).to(tl.float32)
    label = tl.load(labels_ptr + row) if HAS_LABELS else 0
    STEP: tl.constexpr = LANES * VEC * UNROLL
    EDGE: tl.constexpr = edge_width(ODD, VEC)
    span, _ = span_of(first, last, V, student.ptr, student.ptr, grad_row, ODD, LANES, VEC, UNROLL)
    student = row_from(student, span.lead)
    grad_row -= span.lead
    label += span.lead
    slopes = _load_slopes(terms_ptr + row * SPARSE_TERMS, incoming, 1.0 / scalar(scalars_ptr, TEMPERATURE))
    for begin in range(span.edge, span.bound, span.stride):
        for start in range(begin, edge_stop(begin, span), LANES * EDGE):
            _dense_step(student, grad_row, start, span, slopes, label, TAIL, HAS_LABELS, True, ODD, LANES, EDGE, 1)
    for start in range(span.inner, span.outer, STEP):
        _dense_step(student, grad_row, start, span, slopes, label, TAIL, HAS_LABELS, False, ODD, LANES, VEC, UNROLL)


@triton.jit
def topk_kl_stored(
    student_ptr, teacher_ptr, ids_ptr, labels_ptr, mask_ptr, scalars_ptr, terms_ptr, stored_ptr, incoming_ptr, grad_ptr,
    N, student_stride, incoming_stride, V, k, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, CAP: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Overwrite the gradient of the stored ids; equal ids write the same number."""
    temperature = scalar(scalars_ptr, TEMPERATURE)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    valid = is_valid(row, inside, labels_ptr, mask_ptr, ignore_index, HAS_LABELS, HAS_MASK)
    _, ids, kept = stored_ids(teacher_ptr, ids_ptr, row, valid, k, V, K)
    y, slope = _stored_logits(student_ptr, row, student_stride, ids, kept, scalars_ptr, CAP)
    terms = _load_terms((terms_ptr + row * SPARSE_TERMS)[:, None], valid[:, None])
    incoming = tl.load(incoming_ptr + row * incoming_stride, mask=inside, other=0.0).to(tl.float32)[:, None]
    g = tl.load(stored_ptr + row[:, None] * k + tl.arange(0, K)[None, :], mask=kept, other=0.0)
    g = tl.where(terms.kd == 0.0, 0.0, terms.kd * incoming / temperature * g)
    if HAS_LABELS:
        label = tl.load(labels_ptr + row, mask=valid, other=0)[:, None]
        hard = tl.exp((y - terms.top) - terms.log_1) - tl.where(ids == label, 1.0, 0.0)
        g += tl.where(terms.ce == 0.0, 0.0, terms.ce * incoming * hard)
    tl.store(grad_ptr + row[:, None] * V + ids, (g * slope).to(grad_ptr.dtype.element_ty), mask=kept)


class SparseCall(NamedTuple):
    """A call's tensors and codes; `scalars` on the device."""

    student: Tensor
    teacher_logprobs: Tensor
    teacher_ids: Tensor
    labels: Tensor | None
    mask: Tensor | None
    scalars: Tensor
    weighting: int
    divergence: int
    ignore_index: int
    tail: int
    cap: int

    def flags(self) -> dict[str, Any]:
        """The compile-time arguments that every kernel takes."""
        return {"HAS_LABELS": self.labels is not None, "HAS_MASK": self.mask is not None, "CAP": self.cap}

    @property
    def padded(self) -> int:
        """k rounded up to the power of two that a tile needs."""
        return int(triton.next_power_of_2(int(self.teacher_ids.shape[1])))


class SparseTokens(NamedTuple):
    """Per-token results: stats (4, N), weighted losses (N,), and the terms of the gradients of rows and stored ids."""

    stats: Tensor
    losses: Tensor
    terms: Tensor
    stored: Tensor


def prepared(
    student: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor, labels: Tensor | None, mask: Tensor | None,
    scalars: Tensor, weighting: int, divergence: int, ignore_index: int, tail: int, columns: Columns = WHOLE,
) -> SparseCall:  # fmt: skip
    """The call as kernels take it; the arguments are those of the operator, the logits some `columns`."""
    cap = cap_code(scalars, STUDENT_SOFTCAP.value)
    labels, mask, ignore_index = of_columns(columns, contiguous(labels), contiguous(mask), ignore_index)
    ids = teacher_ids.contiguous() if columns is WHOLE else teacher_ids - columns.start
    return SparseCall(
        student, teacher_logprobs.contiguous(), ids, labels, mask, on_device(scalars, student.device),
        weighting, divergence, ignore_index, tail, cap,
    )  # fmt: skip


def partial_statistics(s: SparseCall) -> Tensor:
    """(N, splits, 4): the statistics of the ids not stored in each part of each row."""
    (N, V), device = s.student.shape, s.student.device
    sweep = sweep_of("topk_kl_statistics", device, s.student.element_size(), V)
    misaligned = odd(s.student)
    if (
        misaligned and s.padded == 32
    ):  # ids, a row's ends and a step's columns: in registers, which fewer and more spare
        sweep = sweep._replace(unroll=1)
    splits, size = split_of(sweep, device, N, V)
    partial = torch.empty(N, splits, STUDENT_FIELDS.value, dtype=torch.float32, device=device)
    launch(wrap_triton(topk_kl_statistics), (N, splits),
        s.student, s.teacher_logprobs, s.teacher_ids, s.labels, s.mask, s.scalars, partial,
        s.student.stride(0), V, size, s.ignore_index, s.teacher_ids.shape[1],
        K=s.padded, ODD=misaligned, **s.flags(), **sweep.options(),
    )  # fmt: skip
    return partial


def joined(s: SparseCall, partial: Tensor) -> Tensor:
    """(N, 4): the parts of each row as one."""
    N, splits = partial.shape[:2]
    joined = partial.new_empty(N, STUDENT_FIELDS.value)
    options = joining(splits)
    launch(
        wrap_triton(topk_kl_join), (triton.cdiv(N, options["ROWS"]),), partial, s.scalars, joined, N, splits, **options
    )
    return joined


def token_statistics(s: SparseCall, partial: Tensor, gathered: Tensor | None, vocabulary: int) -> SparseTokens:
    """Join the parts of each row; `gathered` (N, k) are the stored ids' logits at T = 1 where `s.student` has not all
    of them."""
    (N, splits, _), k = partial.shape, s.teacher_ids.shape[1]
    student = s.student if gathered is None else gathered
    new = partial.new_empty
    out = SparseTokens(new(4, N), new(N), new(N, SPARSE_TERMS.value), new(N, k))
    launch(wrap_triton(topk_kl_tokens), (triton.cdiv(N, ROWS),),
        student, s.teacher_logprobs, s.teacher_ids, s.labels, s.mask, s.scalars, partial, *out,
        N, student.stride(0), splits, k, vocabulary, s.ignore_index,
        DIVERGENCE=s.divergence, WEIGHTING=s.weighting, TAIL=s.tail, GATHERED=gathered is not None, K=s.padded,
        SPLITS=triton.next_power_of_2(int(splits)), ROWS=ROWS, **s.flags(),
        **warps(min(16, max(4, s.padded**2 // 1024))),  # up to 32 of the k² comparisons in the registers of a lane
    )  # fmt: skip
    return out


def logits_gradient(s: SparseCall, tokens: SparseTokens, incoming: Tensor) -> Tensor:
    """∂/∂student of Σ incoming·loss, `incoming` one number per token or one for all, in the student's dtype."""
    (N, V), k, device = s.student.shape, s.teacher_ids.shape[1], s.student.device
    sweep = sweep_of("topk_kl_gradient", device, s.student.element_size(), V)
    grad = torch.empty(N, V, dtype=s.student.dtype, device=device)
    misaligned = odd(s.student, grad)
    if misaligned and sweep.vec == 4:  # of fp32: wider, it spills
        sweep = sweep._replace(vec=2)
    stride = int(incoming.dim() > 0)
    launch(wrap_triton(topk_kl_gradient), (N, triton.cdiv(V, sweep.step)),
        s.student, s.labels, s.mask, s.scalars, tokens.terms, incoming, grad,
        s.student.stride(0), stride, V, sweep.step, s.ignore_index,
        TAIL=s.tail, ODD=misaligned, **s.flags(), **sweep.options(),
    )  # fmt: skip
    launch(wrap_triton(topk_kl_stored), (triton.cdiv(N, ROWS),),
        s.student, s.teacher_logprobs, s.teacher_ids, s.labels, s.mask, s.scalars, tokens.terms, tokens.stored,
        incoming, grad, N, s.student.stride(0), stride, V, k, s.ignore_index,
        K=s.padded, ROWS=ROWS, **s.flags(), **warps(2),
    )  # fmt: skip
    return grad


def _stored_logits_of_all(s: SparseCall, columns: Columns, scalars: Tensor) -> Tensor:
    """(N, k): the stored ids' logits at T = 1, whoever holds them; an id of none gets any number."""
    index, held = columns.locate(s.student, s.teacher_ids + columns.start)
    inputs = columns.total(torch.where(held, s.student.gather(-1, index).float(), 0.0))
    return model_logits(inputs, scalars[STUDENT_SCALE.value].item(), scalars[STUDENT_SOFTCAP.value].item())[0]


def _tokens(
    columns: Columns, student: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor, labels: Tensor | None,
    mask: Tensor | None, scalars: Tensor, weighting: int, divergence: int, ignore_index: int, tail: int,
) -> tuple[SparseCall, SparseTokens]:  # fmt: skip
    codes = weighting, divergence, ignore_index, tail
    s = prepared(student, teacher_logprobs, teacher_ids, labels, mask, scalars, *codes, columns)
    partial = columns.parts(partial_statistics(s), lambda own: joined(s, own))
    if columns is WHOLE:
        return s, token_statistics(s, partial, None, student.shape[1])
    gathered = _stored_logits_of_all(s, columns, scalars)
    return s, token_statistics(s._replace(teacher_ids=teacher_ids), partial, gathered, columns.count(student))


def topk_kl(*arguments: Any, columns: Columns = WHOLE) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's kernel: (loss, stats, ∂loss/∂student or an empty tensor)."""
    *inputs, reduction, num_items, need_student = arguments
    s, tokens = _tokens(columns, *inputs)
    empty = s.student.new_empty(0)
    if reduction == NONE:
        return tokens.losses, tokens.stats, empty
    loss, inverse = reduced_loss(tokens.losses, tokens.stats, reduction, num_items)
    return loss, tokens.stats, logits_gradient(s, tokens, inverse) if need_student else empty


def topk_kl_backward(grad_loss: Tensor, *inputs: Any, columns: Columns = WHOLE) -> Tensor:
    """∂/∂student of Σ grad_loss·loss, one incoming gradient per token."""
    s, tokens = _tokens(columns, *inputs)
    return logits_gradient(s, tokens, grad_loss.contiguous())
