"""entropy_kl as Triton kernels: statistics, tokens, loss, gradient.

    statistics (row, split)   one sweep over a part of the row: nine numbers, see statistics.py
    mixture    (row, split)   JSD only: sums over the mixture need both normalisers, hence a second sweep
    tokens     (rows)         joins the splits: divergence, entropy, cross-entropy, weight, per-token loss
    loss       (1)            Σ w·l, Σ w and their quotient, in a fixed order
    gradient   (row, block)   ∂loss/∂x: reads both logits once more and writes once
    row        (row)          all of it but the loss, where no denominator is awaited: the second read comes from L2

The gradients of the divergences, for one token and up to 1/T·∂(capped logit)/∂x, are: forward q − p; reverse
q(log q − log p − KL(q‖p)); JSD with the mixture r = β·p + (1−β)·q, (1−β)·q(log q − log r − KL(q‖r)).
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from e3kernels.contract import REDUCTIONS
from e3kernels.triton.launch import contiguous, fills_device, split_of, sweep_of, warps
from e3kernels.triton.reduction import SUM, reduced_loss
from e3kernels.triton.scalars import (
    GAMMA,
    KD_RATIO,
    STUDENT_SOFTCAP,
    TEACHER_SOFTCAP,
    TEMPERATURE,
    cap_code,
    mixing,
    on_device,
    scalar,
    student_transform,
    teacher_transform,
)
from e3kernels.triton.statistics import FORWARD, JSD, NO_MASS, PAIR_FIELDS, UNIT, merge_pair
from e3kernels.triton.sweeps import (
    label_logit,
    load_pair,
    store_pair,
    sweep_gradient,
    sweep_mixture,
    sweep_pair,
    sweep_zero,
)
from e3kernels.triton.tokens import ENTROPY, INVERSE, coefficients, is_valid, store_tokens, token_loss

NONE = REDUCTIONS.index("none")
ROW_FIELDS: tl.constexpr = tl.constexpr(8)  # my, log S_s, log C, mt, log S_t, term, kd, ce


@triton.jit
def _closed_divergence(my, ss, mt, st, b, gap, inverse_temperature, DIVERGENCE: tl.constexpr):
    """KL(p‖q) or KL(q‖p) from the joined statistics."""
    log_ss = tl.log(ss)
    log_st = tl.log(st)
    if DIVERGENCE == FORWARD:
        unmatched = (gap - mt) * inverse_temperature - log_st
        value = b / st / UNIT + (log_ss - log_st)
    else:
        unmatched = (gap - my) * inverse_temperature - log_ss
        value = b / ss / UNIT + (log_st - log_ss)
    return tl.where(unmatched > NO_MASS, float("inf"), value)


@triton.jit
def entropy_kl_statistics(
    student_ptr, teacher_ptr, labels_ptr, mask_ptr, scalars_ptr, partial_ptr,
    student_stride, teacher_stride, V, split_size, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, DIVERGENCE: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if not is_valid(row, row >= 0, labels_ptr, mask_ptr, ignore_index, HAS_LABELS, HAS_MASK):
        return
    temperature = scalar(scalars_ptr, TEMPERATURE)
    inverse_temperature = 1.0 / temperature
    scale_s, softcap_s = student_transform(scalars_ptr)
    scale_t, softcap_t = teacher_transform(scalars_ptr)
    student_row = student_ptr + row * student_stride
    teacher_row = teacher_ptr + row * teacher_stride
    first = split * split_size
    last = tl.minimum(first + split_size, V)
    my, ss, cs, mt, st, a, b, gap = sweep_pair(
        student_row, teacher_row, first, last, V, inverse_temperature, scale_s, scale_t, softcap_s, softcap_t,
        DIVERGENCE, HAS_LABELS, CAP_S, CAP_T, LANES, VEC, UNROLL,
    )  # fmt: skip
    y_label = 0.0
    if HAS_LABELS:
        y_label = label_logit(student_row, tl.load(labels_ptr + row), first, last, scale_s, softcap_s, CAP_S)
    out = partial_ptr + (row * tl.num_programs(1) + split) * PAIR_FIELDS
    store_pair(out, None, my, ss, cs, y_label, mt, st, a, b, gap)


@triton.jit
def entropy_kl_mixture(
    student_ptr, teacher_ptr, labels_ptr, mask_ptr, scalars_ptr, partial_ptr, mixture_ptr,
    student_stride, teacher_stride, V, split_size, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    SPLITS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    if not is_valid(row, row >= 0, labels_ptr, mask_ptr, ignore_index, HAS_LABELS, HAS_MASK):
        return
    temperature = scalar(scalars_ptr, TEMPERATURE)
    inverse_temperature = 1.0 / temperature
    scale_s, softcap_s = student_transform(scalars_ptr)
    scale_t, softcap_t = teacher_transform(scalars_ptr)
    parts = tl.arange(0, SPLITS)
    my, ss, cs, _, mt, st, a, b, gap = load_pair(partial_ptr, row * splits + parts, parts < splits)
    my, ss, cs, mt, st, a, b, gap = merge_pair(my, ss, cs, mt, st, a, b, gap, inverse_temperature, JSD, 0)
    first = split * split_size
    beta, rest = mixing(scalars_ptr)
    from_student, from_teacher = sweep_mixture(
        student_ptr + row * student_stride, teacher_ptr + row * teacher_stride,
        first, tl.minimum(first + split_size, V), V,
        my, tl.log(ss), mt, tl.log(st), inverse_temperature, beta, rest, scale_s, scale_t, softcap_s, softcap_t,
        CAP_S, CAP_T, LANES, VEC, UNROLL,
    )  # fmt: skip
    out = mixture_ptr + (row * splits + split) * 2
    tl.store(out, from_student)
    tl.store(out + 1, from_teacher)


@triton.jit
def entropy_kl_tokens(
    partial_ptr, mixture_ptr, labels_ptr, mask_ptr, scalars_ptr, stats_ptr, loss_ptr, rows_ptr,
    N, splits, log_support, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, DIVERGENCE: tl.constexpr, WEIGHTING: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Join the splits of ROWS tokens: statistics, losses, and the numbers of each row that its gradient needs."""
    temperature = scalar(scalars_ptr, TEMPERATURE)
    inverse_temperature = 1.0 / temperature
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    valid = is_valid(row, inside, labels_ptr, mask_ptr, ignore_index, HAS_LABELS, HAS_MASK)
    parts = tl.arange(0, SPLITS)[None, :]
    present = valid[:, None] & (parts < splits)
    index = row[:, None] * splits + parts
    my, ss, cs, y_label, mt, st, a, b, gap = load_pair(partial_ptr, index, present)
    my, ss, cs, mt, st, a, b, gap = merge_pair(my, ss, cs, mt, st, a, b, gap, inverse_temperature, DIVERGENCE, 1)
    if DIVERGENCE == JSD:
        term = tl.sum(tl.load(mixture_ptr + index * 2, mask=present, other=0.0), axis=1)
        from_teacher = tl.sum(tl.load(mixture_ptr + index * 2 + 1, mask=present, other=0.0), axis=1)
        beta, rest = mixing(scalars_ptr)
        divergence = beta * from_teacher + rest * term
    else:
        term = _closed_divergence(my, ss, mt, st, b, gap, inverse_temperature, DIVERGENCE)
        divergence = term
    log_st = tl.log(st)
    log_cs = tl.log(cs)
    entropy = log_st - a / st
    cross_entropy = (my - tl.sum(y_label, axis=1)) + log_cs if HAS_LABELS else tl.zeros_like(entropy)
    weight, kd, ce = coefficients(
        entropy, tl.cast(log_support, tl.float32), temperature,
        scalar(scalars_ptr, GAMMA), scalar(scalars_ptr, KD_RATIO), WEIGHTING,
    )  # fmt: skip
    loss = token_loss(divergence, cross_entropy, kd, ce, HAS_LABELS)
    store_tokens(stats_ptr, loss_ptr, row, N, valid, divergence, entropy, cross_entropy, weight, loss)
    out = rows_ptr + row * ROW_FIELDS
    tl.store(out, my, mask=valid)
    tl.store(out + 1, tl.log(ss), mask=valid)
    tl.store(out + 2, log_cs, mask=valid)
    tl.store(out + 3, mt, mask=valid)
    tl.store(out + 4, log_st, mask=valid)
    tl.store(out + 5, term, mask=valid)
    tl.store(out + 6, kd, mask=valid)
    tl.store(out + 7, ce, mask=valid)


@triton.jit
def entropy_kl_gradient(
    student_ptr, teacher_ptr, labels_ptr, mask_ptr, scalars_ptr, rows_ptr, incoming_ptr, grad_ptr,
    student_stride, teacher_stride, grad_stride, incoming_stride, V, split_size, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, DIVERGENCE: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """∂/∂x of the token's loss times its incoming gradient: one a token, or one for all (stride 0)."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * split_size
    last = tl.minimum(first + split_size, V)
    grad_row = grad_ptr + row * grad_stride
    if not is_valid(row, row >= 0, labels_ptr, mask_ptr, ignore_index, HAS_LABELS, HAS_MASK):
        sweep_zero(grad_row, first, last, V, LANES, VEC)
        return
    scale_s, softcap_s = student_transform(scalars_ptr)
    scale_t, softcap_t = teacher_transform(scalars_ptr)
    fields = rows_ptr + row * ROW_FIELDS
    incoming = tl.load(incoming_ptr + row * incoming_stride).to(tl.float32)
    label = tl.load(labels_ptr + row) if HAS_LABELS else 0
    beta, rest = mixing(scalars_ptr)
    sweep_gradient(
        student_ptr + row * student_stride, teacher_ptr + row * teacher_stride, grad_row, first, last, V,
        tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3), tl.load(fields + 4),
        tl.load(fields + 5), tl.load(fields + 6), tl.load(fields + 7), incoming, label,
        1.0 / scalar(scalars_ptr, TEMPERATURE), beta, rest, scale_s, scale_t, softcap_s, softcap_t,
        DIVERGENCE, HAS_LABELS, CAP_S, CAP_T, LANES, VEC, UNROLL,
    )  # fmt: skip


@triton.jit
def entropy_kl_row(
    student_ptr, teacher_ptr, labels_ptr, mask_ptr, scalars_ptr, stats_ptr, loss_ptr, incoming_ptr, grad_ptr,
    student_stride, teacher_stride, grad_stride, incoming_stride, N, V, log_support, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, DIVERGENCE: tl.constexpr, WEIGHTING: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One token from its logits to its statistics, loss and gradient; the gradient may overwrite the student's row."""
    row = tl.program_id(0).to(tl.int64)
    grad_row = grad_ptr + row * grad_stride
    valid = is_valid(row, row >= 0, labels_ptr, mask_ptr, ignore_index, HAS_LABELS, HAS_MASK)
    if not valid:
        sweep_zero(grad_row, 0, V, V, LANES, VEC)
        store_tokens(stats_ptr, loss_ptr, row, N, valid, 0.0, 0.0, 0.0, 0.0, 0.0)
        return
    temperature = scalar(scalars_ptr, TEMPERATURE)
    inverse_temperature = 1.0 / temperature
    beta, rest = mixing(scalars_ptr)
    scale_s, softcap_s = student_transform(scalars_ptr)
    scale_t, softcap_t = teacher_transform(scalars_ptr)
    student_row = student_ptr + row * student_stride
    teacher_row = teacher_ptr + row * teacher_stride
    my, ss, cs, mt, st, a, b, gap = sweep_pair(
        student_row, teacher_row, 0, V, V, inverse_temperature, scale_s, scale_t, softcap_s, softcap_t,
        DIVERGENCE, HAS_LABELS, CAP_S, CAP_T, LANES, VEC, UNROLL,
    )  # fmt: skip
    log_ss = tl.log(ss)
    log_st = tl.log(st)
    log_cs = tl.log(cs)
    if DIVERGENCE == JSD:
        term, from_teacher = sweep_mixture(
            student_row, teacher_row, 0, V, V, my, log_ss, mt, log_st, inverse_temperature, beta, rest, scale_s,
            scale_t, softcap_s, softcap_t, CAP_S, CAP_T, LANES, VEC, UNROLL,
        )  # fmt: skip
        divergence = beta * from_teacher + rest * term
    else:
        term = _closed_divergence(my, ss, mt, st, b, gap, inverse_temperature, DIVERGENCE)
        divergence = term
    entropy = log_st - a / st
    label = tl.load(labels_ptr + row) if HAS_LABELS else 0
    cross_entropy = 0.0
    if HAS_LABELS:
        cross_entropy = (my - label_logit(student_row, label, 0, V, scale_s, softcap_s, CAP_S)) + log_cs
    weight, kd, ce = coefficients(
        entropy, tl.cast(log_support, tl.float32), temperature,
        scalar(scalars_ptr, GAMMA), scalar(scalars_ptr, KD_RATIO), WEIGHTING,
    )  # fmt: skip
    loss = token_loss(divergence, cross_entropy, kd, ce, HAS_LABELS)
    store_tokens(stats_ptr, loss_ptr, row, N, valid, divergence, entropy, cross_entropy, weight, loss)
    incoming = tl.load(incoming_ptr + row * incoming_stride).to(tl.float32)
    tl.debug_barrier()  # the gradient may overwrite the logits: the label's must have been read
    sweep_gradient(
        student_row, teacher_row, grad_row, 0, V, V, my, log_ss, log_cs, mt, log_st, term, kd, ce, incoming, label,
        inverse_temperature, beta, rest, scale_s, scale_t, softcap_s, softcap_t,
        DIVERGENCE, HAS_LABELS, CAP_S, CAP_T, LANES, VEC, UNROLL,
    )  # fmt: skip


class Dense(NamedTuple):
    """A call's tensors and codes; `scalars` on the device, caps as `scaled_logits` has them."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    mask: Tensor | None
    scalars: Tensor
    weighting: int
    divergence: int
    ignore_index: int
    cap_s: int
    cap_t: int

    def flags(self) -> dict[str, Any]:
        """The compile-time arguments that every sweep takes."""
        return {
            "HAS_LABELS": self.labels is not None,
            "HAS_MASK": self.mask is not None,
            "DIVERGENCE": self.divergence,
            "CAP_S": self.cap_s,
            "CAP_T": self.cap_t,
        }


class Tokens(NamedTuple):
    """Per-token results: stats (4, N), weighted losses (N,), and the rows' fields for the gradient."""

    stats: Tensor
    losses: Tensor
    rows: Tensor


def prepared(
    student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None, scalars: Tensor, weighting: int,
    divergence: int, ignore_index: int,
) -> Dense:  # fmt: skip
    """The call as kernels take it; the arguments are those of the operator."""
    caps = cap_code(scalars, STUDENT_SOFTCAP.value), cap_code(scalars, TEACHER_SOFTCAP.value)
    labels, mask = contiguous(labels), contiguous(mask)
    scalars = on_device(scalars, student.device)
    return Dense(student, teacher, labels, mask, scalars, weighting, divergence, ignore_index, *caps)


def partial_statistics(d: Dense) -> Tensor:
    """(N, splits, 9): the statistics of each part of each row. Those of vocabulary-parallel ranks, concatenated along
    the second dimension, are joined by `token_statistics` as the parts of one row are."""
    (N, V), device = d.student.shape, d.student.device
    sweep = sweep_of("statistics", device, d.student.element_size(), V)
    splits, size = split_of(sweep, device, N, V)
    partial = torch.empty(N, splits, PAIR_FIELDS.value, dtype=torch.float32, device=device)
    wrap_triton(entropy_kl_statistics)[(N, splits)](
        d.student, d.teacher, d.labels, d.mask, d.scalars, partial,
        d.student.stride(0), d.teacher.stride(0), V, size, d.ignore_index,
        **d.flags(), **sweep.options(),
    )  # fmt: skip
    return partial


def mixture_sums(d: Dense, partial: Tensor) -> Tensor:
    """(N, splits, 2): Σ q(log q − log r) and Σ p(log p − log r) of each part of each row."""
    (N, V), device = d.student.shape, d.student.device
    sweep = sweep_of("statistics", device, d.student.element_size(), V)
    splits, size = split_of(sweep, device, N, V)
    sums = torch.empty(N, splits, 2, dtype=torch.float32, device=device)
    flags = d.flags()
    del flags["DIVERGENCE"]
    wrap_triton(entropy_kl_mixture)[(N, splits)](
        d.student, d.teacher, d.labels, d.mask, d.scalars, partial, sums,
        d.student.stride(0), d.teacher.stride(0), V, size, d.ignore_index,
        SPLITS=triton.next_power_of_2(splits), **flags, **sweep.options(),
    )  # fmt: skip
    return sums


def token_statistics(d: Dense, partial: Tensor, mixture: Tensor | None, vocabulary: int) -> Tokens:
    """Join the parts of each row; `vocabulary` is the size S of the teacher's support."""
    N, splits = partial.shape[:2]
    new = partial.new_empty
    out = Tokens(new(4, N), new(N), new(N, ROW_FIELDS.value))
    rows = 32
    wrap_triton(entropy_kl_tokens)[(triton.cdiv(N, rows),)](
        partial, mixture, d.labels, d.mask, d.scalars, *out, N, splits, math.log(vocabulary), d.ignore_index,
        HAS_LABELS=d.labels is not None, HAS_MASK=d.mask is not None, DIVERGENCE=d.divergence, WEIGHTING=d.weighting,
        SPLITS=triton.next_power_of_2(int(splits)), ROWS=rows, **warps(1),
    )  # fmt: skip
    return out


def logits_gradient(d: Dense, rows: Tensor, incoming: Tensor) -> Tensor:
    """∂/∂student of Σ incoming·loss, `incoming` one number a token or one for all, in the student's dtype."""
    (N, V), device = d.student.shape, d.student.device
    sweep = sweep_of("gradient", device, d.student.element_size(), V)
    grad = torch.empty(N, V, dtype=d.student.dtype, device=device)
    wrap_triton(entropy_kl_gradient)[(N, triton.cdiv(V, sweep.step))](
        d.student, d.teacher, d.labels, d.mask, d.scalars, rows, incoming, grad,
        d.student.stride(0), d.teacher.stride(0), V, int(incoming.dim() > 0), V, sweep.step, d.ignore_index,
        **d.flags(), **sweep.options(),
    )  # fmt: skip
    return grad


def rows_at_once(d: Dense, incoming: Tensor, grad: Tensor) -> Tokens:
    """Statistics and gradient of whole rows in one kernel; `grad` (N, V) is written and may be the student itself."""
    (N, V), device = d.student.shape, d.student.device
    sweep = sweep_of("row", device, d.student.element_size(), V)
    stats, losses = (torch.empty(shape, dtype=torch.float32, device=device) for shape in ((4, N), (N,)))
    wrap_triton(entropy_kl_row)[(N,)](
        d.student, d.teacher, d.labels, d.mask, d.scalars, stats, losses, incoming, grad,
        d.student.stride(0), d.teacher.stride(0), grad.stride(0), int(incoming.dim() > 0), N, V, math.log(V),
        d.ignore_index, WEIGHTING=d.weighting, **d.flags(), **sweep.options(),
    )  # fmt: skip
    return Tokens(stats, losses, stats)


def _split_rows(d: Dense) -> Tokens:
    partial = partial_statistics(d)
    mixture = mixture_sums(d, partial) if d.divergence == JSD.value else None
    return token_statistics(d, partial, mixture, d.student.shape[1])


def _known_denominator(d: Dense, reduction: int, num_items: Tensor | None) -> Tensor | None:
    """1/denominator where it is known before the statistics are, else None."""
    device = d.student.device
    if reduction == SUM:
        return torch.ones((), device=device)
    if num_items is not None:
        return num_items.to(device, torch.float32).reciprocal()
    if d.weighting in (ENTROPY.value, INVERSE.value):
        return None
    valid = torch.ones(d.student.shape[0], dtype=torch.bool, device=device) if d.mask is None else d.mask
    valid = valid if d.labels is None else valid & (d.labels != d.ignore_index)
    return valid.sum(dtype=torch.float32).clamp(min=1).reciprocal()


def entropy_kl(
    student: Tensor, teacher: Tensor, labels: Tensor | None, token_mask: Tensor | None, scalars: Tensor,
    weighting: int, divergence: int, ignore_index: int, reduction: int, num_items: Tensor | None, need_student: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator's kernel: (loss, stats, ∂loss/∂student or an empty tensor)."""
    d = prepared(student, teacher, labels, token_mask, scalars, weighting, divergence, ignore_index)
    empty = student.new_empty(0)
    want = need_student and reduction != NONE
    inverse = _known_denominator(d, reduction, num_items) if want and fills_device(student) else None
    if inverse is not None:
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        tokens = rows_at_once(d, inverse, grad)
        return reduced_loss(tokens.losses, tokens.stats, reduction, num_items)[0], tokens.stats, grad
    tokens = _split_rows(d)
    if reduction == NONE:
        return tokens.losses, tokens.stats, empty
    loss, inverse = reduced_loss(tokens.losses, tokens.stats, reduction, num_items)
    return loss, tokens.stats, logits_gradient(d, tokens.rows, inverse) if want else empty


def entropy_kl_backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, labels: Tensor | None, token_mask: Tensor | None,
    scalars: Tensor, weighting: int, divergence: int, ignore_index: int,
) -> Tensor:  # fmt: skip
    """∂/∂student of Σ grad_loss·loss, one incoming gradient a token."""
    d = prepared(student, teacher, labels, token_mask, scalars, weighting, divergence, ignore_index)
    if fills_device(student):
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        rows_at_once(d, grad_loss.contiguous(), grad)
        return grad
    return logits_gradient(d, _split_rows(d).rows, grad_loss.contiguous())
