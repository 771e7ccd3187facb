"""entropy_kl as Triton kernels: statistics, tokens, loss, gradient.

    statistics (row, split)   one sweep over a part of the row: eleven numbers, see statistics.py
    join       (rows)         for a vocabulary that ranks share: a rank's splits as one, before all gather theirs
    mixture    (row, split)   JSD only: sums over the mixture need both normalisers, hence a second sweep
    tokens     (rows)         joins the splits: divergence, entropy, cross-entropy, weight, per-token loss
    loss       (1)            Σ w·l, Σ w and their quotient, in a fixed order
    gradient   (row, block)   ∂loss/∂x: reads both logits once more and writes once
    row        (row)          all of it but the loss, where no denominator is awaited: the second read comes from L2

The gradients of the divergences, for one token and up to 1/T·∂(capped logit)/∂x, are: forward q − p; reverse
q(log q − log p − KL(q‖p)); adaptive α times the first and 1 − α times the second; JSD with the mixture
r = β·p + (1−β)·q, (1−β)·q(log q − log r − KL(q‖r)).
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3kernels.compat import wrap_triton
from e3kernels.contract import REDUCTIONS
from e3kernels.reference.columns import WHOLE, Columns
from e3kernels.triton.launch import contiguous, fills_device, joining, launch, odd, split_of, sweep_of
from e3kernels.triton.reduction import SUM, reduced_loss
from e3kernels.triton.scalars import (
    STUDENT_SOFTCAP,
    TEACHER_SOFTCAP,
    TEMPERATURE,
    cap_code,
    mixing,
    number_on,
    on_device,
    scalar,
    student_transform,
    teacher_transform,
)
from e3kernels.triton.statistics import (
    ADAPTIVE,
    FORWARD,
    JSD,
    NO_MASS,
    PAIR_FIELDS,
    UNIT,
    Row,
    load_pair,
    merge_pair,
    store_pair,
)
from e3kernels.triton.sweeps.gradient import TERMS, Terms, load_terms, store_terms, sweep_gradient, sweep_mixture
from e3kernels.triton.sweeps.pair import sweep_pair
from e3kernels.triton.sweeps.span import label_logit, sweep_zero
from e3kernels.triton.tokens import ENTROPY, INVERSE, entropy_share, is_valid, of_columns, store_tokens, weigh_tokens

NONE = REDUCTIONS.index("none")


@triton.jit
def _kl(cross, first, second, inverse_temperature):
    """The divergence of the second model from the first, from their joined statistics."""
    log_first = tl.log(first.total)
    unmatched = (cross.gap - first.top) * inverse_temperature - log_first
    value = cross.b / first.total / UNIT + (tl.log(second.total) - log_first)
    return tl.where(unmatched > NO_MASS, float("inf"), value)


@triton.jit
def _entropy(teacher):
    return tl.log(teacher.total) - teacher.a / teacher.total


@triton.jit
def _closed_divergence(pair, log_support, inverse_temperature, DIVERGENCE: tl.constexpr):
    """(D, the term and the share of its gradient) from the joined statistics, for all but the JSD."""
    share = tl.full(pair.teacher.total.shape, 0.0, tl.float32)
    if DIVERGENCE == FORWARD:
        term = _kl(pair.forward, pair.teacher, pair.student, inverse_temperature)
        divergence = term
    else:
        term = _kl(pair.reverse, pair.student, pair.teacher, inverse_temperature)
        divergence = term
        if DIVERGENCE == ADAPTIVE:
            share = entropy_share(_entropy(pair.teacher), tl.cast(log_support, tl.float32))
            forward = _kl(pair.forward, pair.teacher, pair.student, inverse_temperature)
            divergence = tl.where(share == 0.0, 0.0, share * forward)
            divergence += tl.where(share == 1.0, 0.0, (1.0 - share) * term)
    return divergence, term, share


@triton.jit
def _token_terms(
    stats_ptr, loss_ptr, row, N, valid, pair, y_label, divergence, term, share, log_support, temperature,
    scalars_ptr, WEIGHTING: tl.constexpr, HAS_LABELS: tl.constexpr,
):  # fmt: skip
    """Store the statistics and losses of tokens with joined statistics; what their gradients need."""
    student, teacher = pair.student, pair.teacher
    log_t = tl.log(teacher.total)
    log_1 = tl.log(student.total_1)
    entropy = _entropy(teacher)
    cross_entropy = (student.top - y_label) + log_1 if HAS_LABELS else tl.full(entropy.shape, 0.0, tl.float32)
    kd, ce = weigh_tokens(
        stats_ptr, loss_ptr, row, N, valid, divergence, entropy, cross_entropy, tl.cast(log_support, tl.float32),
        temperature, scalars_ptr, WEIGHTING, HAS_LABELS,
    )  # fmt: skip
    return Terms(student.top, tl.log(student.total), log_1, teacher.top, log_t, term, kd, ce, share)


@triton.jit
def entropy_kl_statistics(
    student_ptr, teacher_ptr, labels_ptr, mask_ptr, scalars_ptr, partial_ptr,
    student_stride, teacher_stride, V, split_size, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, DIVERGENCE: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, ODD: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if not is_valid(row, row >= 0, labels_ptr, mask_ptr, ignore_index, HAS_LABELS, HAS_MASK):
        return
    inverse_temperature = 1.0 / scalar(scalars_ptr, TEMPERATURE)
    student = Row(student_ptr + row * student_stride, student_transform(scalars_ptr, CAP_S))
    teacher = Row(teacher_ptr + row * teacher_stride, teacher_transform(scalars_ptr, CAP_T))
    first = split * split_size
    last = tl.minimum(first + split_size, V)
    pair = sweep_pair(
        student, teacher, first, last, V, inverse_temperature, DIVERGENCE, HAS_LABELS, ODD, LANES, VEC, UNROLL
    )
    y_label = 0.0
    if HAS_LABELS:
        y_label = label_logit(student, tl.load(labels_ptr + row), first, last)
    store_pair(partial_ptr + (row * tl.num_programs(1) + split) * PAIR_FIELDS, None, pair, y_label)


@triton.jit
def entropy_kl_join(
    partial_ptr, scalars_ptr, joined_ptr, N, splits, DIVERGENCE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr
):
    """Join the splits of ROWS tokens to one."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    parts = tl.arange(0, SPLITS)[None, :]
    present = (row < N)[:, None] & (parts < splits)
    pair, y_label = load_pair(partial_ptr + (row[:, None] * splits + parts) * PAIR_FIELDS, present)
    pair = merge_pair(pair, 1.0 / scalar(scalars_ptr, TEMPERATURE), DIVERGENCE, 1)
    store_pair(joined_ptr + row * PAIR_FIELDS, row < N, pair, tl.sum(y_label, axis=1))


@triton.jit
def entropy_kl_mixture(
    student_ptr, teacher_ptr, labels_ptr, mask_ptr, scalars_ptr, partial_ptr, mixture_ptr,
    student_stride, teacher_stride, V, split_size, splits, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    SPLITS: tl.constexpr, ODD: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """`splits` is the number of parts that make up the row, which another rank may hold."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if not is_valid(row, row >= 0, labels_ptr, mask_ptr, ignore_index, HAS_LABELS, HAS_MASK):
        return
    inverse_temperature = 1.0 / scalar(scalars_ptr, TEMPERATURE)
    student = Row(student_ptr + row * student_stride, student_transform(scalars_ptr, CAP_S))
    teacher = Row(teacher_ptr + row * teacher_stride, teacher_transform(scalars_ptr, CAP_T))
    parts = tl.arange(0, SPLITS)
    pair, _ = load_pair(partial_ptr + (row * splits + parts) * PAIR_FIELDS, parts < splits)
    pair = merge_pair(pair, inverse_temperature, JSD, 0)
    first = split * split_size
    from_student, from_teacher = sweep_mixture(
        student, teacher, first, tl.minimum(first + split_size, V), V,
        pair.student.top, tl.log(pair.student.total), pair.teacher.top, tl.log(pair.teacher.total),
        inverse_temperature, mixing(scalars_ptr), ODD, LANES, VEC, UNROLL,
    )  # fmt: skip
    out = mixture_ptr + (row * tl.num_programs(1) + split) * 2
    tl.store(out, from_student)
    tl.store(out + 1, from_teacher)


@triton.jit
def entropy_kl_tokens(
    partial_ptr, mixture_ptr, labels_ptr, mask_ptr, scalars_ptr, stats_ptr, loss_ptr, terms_ptr,
    N, splits, log_support, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, DIVERGENCE: tl.constexpr, WEIGHTING: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Join the splits of ROWS tokens: statistics, losses, and the terms of each row's gradient."""
    temperature = scalar(scalars_ptr, TEMPERATURE)
    inverse_temperature = 1.0 / temperature
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = is_valid(row, row < N, labels_ptr, mask_ptr, ignore_index, HAS_LABELS, HAS_MASK)
    parts = tl.arange(0, SPLITS)[None, :]
    present = valid[:, None] & (parts < splits)
    index = row[:, None] * splits + parts
    pair, y_label = load_pair(partial_ptr + index * PAIR_FIELDS, present)
    pair = merge_pair(pair, inverse_temperature, DIVERGENCE, 1)
    if DIVERGENCE == JSD:
        term = tl.sum(tl.load(mixture_ptr + index * 2, mask=present, other=0.0), axis=1)
        from_teacher = tl.sum(tl.load(mixture_ptr + index * 2 + 1, mask=present, other=0.0), axis=1)
        mix = mixing(scalars_ptr)
        divergence = mix.beta * from_teacher + mix.rest * term
        share = tl.full(term.shape, 0.0, tl.float32)
    else:
        divergence, term, share = _closed_divergence(pair, log_support, inverse_temperature, DIVERGENCE)
    terms = _token_terms(
        stats_ptr, loss_ptr, row, N, valid, pair, tl.sum(y_label, axis=1), divergence, term, share, log_support,
        temperature, scalars_ptr, WEIGHTING, HAS_LABELS,
    )  # fmt: skip
    store_terms(terms_ptr + row * TERMS, valid, terms)


@triton.jit
def entropy_kl_gradient(
    student_ptr, teacher_ptr, labels_ptr, mask_ptr, scalars_ptr, terms_ptr, incoming_ptr, grad_ptr,
    student_stride, teacher_stride, grad_stride, incoming_stride, V, split_size, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, DIVERGENCE: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, ODD: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """∂/∂x of the token's loss times its incoming gradient: one a token, or one for all (stride 0)."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * split_size
    last = tl.minimum(first + split_size, V)
    grad_row = grad_ptr + row * grad_stride
    if not is_valid(row, row >= 0, labels_ptr, mask_ptr, ignore_index, HAS_LABELS, HAS_MASK):
        sweep_zero(grad_row, first, last, V, ODD, LANES, VEC, UNROLL)
        return
    student = Row(student_ptr + row * student_stride, student_transform(scalars_ptr, CAP_S))
    teacher = Row(teacher_ptr + row * teacher_stride, teacher_transform(scalars_ptr, CAP_T))
    incoming = tl.load(incoming_ptr + row * incoming_stride).to(tl.float32)
    label = tl.load(labels_ptr + row) if HAS_LABELS else 0
    sweep_gradient(
        student, teacher, grad_row, first, last, V, load_terms(terms_ptr + row * TERMS), incoming, label,
        1.0 / scalar(scalars_ptr, TEMPERATURE), mixing(scalars_ptr), DIVERGENCE, HAS_LABELS, ODD, LANES, VEC, UNROLL,
    )  # fmt: skip


@triton.jit
def entropy_kl_row(
    student_ptr, teacher_ptr, labels_ptr, mask_ptr, scalars_ptr, stats_ptr, loss_ptr, incoming_ptr, grad_ptr,
    student_stride, teacher_stride, grad_stride, incoming_stride, N, V, log_support, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, DIVERGENCE: tl.constexpr, WEIGHTING: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, ODD: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One token from its logits to its statistics, loss and gradient; the gradient may overwrite the student's row."""
    row = tl.program_id(0).to(tl.int64)
    grad_row = grad_ptr + row * grad_stride
    valid = is_valid(row, row >= 0, labels_ptr, mask_ptr, ignore_index, HAS_LABELS, HAS_MASK)
    if not valid:
        sweep_zero(grad_row, 0, V, V, ODD, LANES, VEC, UNROLL)
        store_tokens(stats_ptr, loss_ptr, row, N, valid, 0.0, 0.0, 0.0, 0.0, 0.0)
        return
    temperature = scalar(scalars_ptr, TEMPERATURE)
    inverse_temperature = 1.0 / temperature
    mix = mixing(scalars_ptr)
    student = Row(student_ptr + row * student_stride, student_transform(scalars_ptr, CAP_S))
    teacher = Row(teacher_ptr + row * teacher_stride, teacher_transform(scalars_ptr, CAP_T))
    pair = sweep_pair(student, teacher, 0, V, V, inverse_temperature, DIVERGENCE, HAS_LABELS, ODD, LANES, VEC, UNROLL)
    if DIVERGENCE == JSD:
        term, from_teacher = sweep_mixture(
            student, teacher, 0, V, V, pair.student.top, tl.log(pair.student.total), pair.teacher.top,
            tl.log(pair.teacher.total), inverse_temperature, mix, ODD, LANES, VEC, UNROLL,
        )  # fmt: skip
        divergence = mix.beta * from_teacher + mix.rest * term
        share = tl.full(term.shape, 0.0, tl.float32)
    else:
        divergence, term, share = _closed_divergence(pair, log_support, inverse_temperature, DIVERGENCE)
    label = tl.load(labels_ptr + row) if HAS_LABELS else 0
    y_label = label_logit(student, label, 0, V) if HAS_LABELS else 0.0
    terms = _token_terms(
        stats_ptr, loss_ptr, row, N, valid, pair, y_label, divergence, term, share, log_support, temperature,
        scalars_ptr, WEIGHTING, HAS_LABELS,
    )  # fmt: skip
    incoming = tl.load(incoming_ptr + row * incoming_stride).to(tl.float32)
    tl.debug_barrier()  # the gradient may overwrite the logits: the label's must have been read
    sweep_gradient(
        student, teacher, grad_row, 0, V, V, terms, incoming, label, inverse_temperature, mix,
        DIVERGENCE, HAS_LABELS, ODD, LANES, VEC, UNROLL,
    )  # fmt: skip


class DenseCall(NamedTuple):
    """A call's tensors and codes; `scalars` on the device, caps as a `Transform` has them."""

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


class DenseTokens(NamedTuple):
    """Per-token results: stats (4, N), weighted losses (N,), and the terms of the rows' gradients (N, 9)."""

    stats: Tensor
    losses: Tensor
    terms: Tensor


def prepared(
    student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None, scalars: Tensor, weighting: int,
    divergence: int, ignore_index: int, columns: Columns = WHOLE,
) -> DenseCall:  # fmt: skip
    """The call as kernels take it; the arguments are those of the operator, the logits some `columns`."""
    caps = cap_code(scalars, STUDENT_SOFTCAP.value), cap_code(scalars, TEACHER_SOFTCAP.value)
    labels, mask, ignore_index = of_columns(columns, contiguous(labels), contiguous(mask), ignore_index)
    scalars = on_device(scalars, student.device)
    return DenseCall(student, teacher, labels, mask, scalars, weighting, divergence, ignore_index, *caps)


def partial_statistics(d: DenseCall) -> Tensor:
    """(N, splits, 11): the statistics of each part of each row."""
    (N, V), device = d.student.shape, d.student.device
    sweep = sweep_of("entropy_kl_statistics", device, d.student.element_size(), V)
    splits, size = split_of(sweep, device, N, V)
    partial = torch.empty(N, splits, PAIR_FIELDS.value, dtype=torch.float32, device=device)
    launch(wrap_triton(entropy_kl_statistics), (N, splits),
        d.student, d.teacher, d.labels, d.mask, d.scalars, partial,
        d.student.stride(0), d.teacher.stride(0), V, size, d.ignore_index,
        ODD=odd(d.student, d.teacher), **d.flags(), **sweep.options(),
    )  # fmt: skip
    return partial


def joined(d: DenseCall, partial: Tensor) -> Tensor:
    """(N, 11): the parts of each row as one."""
    N, splits = partial.shape[:2]
    joined = partial.new_empty(N, PAIR_FIELDS.value)
    options = joining(splits)
    launch(
        wrap_triton(entropy_kl_join),
        (triton.cdiv(N, options["ROWS"]),),
        partial,
        d.scalars,
        joined,
        N,
        splits,
        DIVERGENCE=d.divergence,
        **options,
    )
    return joined


def mixture_sums(d: DenseCall, partial: Tensor) -> Tensor:
    """(N, splits, 2): Σ q(log q − log r) and Σ p(log p − log r) of each part of each row; `partial` (N, parts, 9) are
    the statistics of all."""
    (N, V), device, parts = d.student.shape, d.student.device, partial.shape[1]
    sweep = sweep_of("entropy_kl_mixture", device, d.student.element_size(), V)
    splits, size = split_of(sweep, device, N, V)
    sums = torch.empty(N, splits, 2, dtype=torch.float32, device=device)
    flags = d.flags()
    del flags["DIVERGENCE"]
    launch(wrap_triton(entropy_kl_mixture), (N, splits),
        d.student, d.teacher, d.labels, d.mask, d.scalars, partial, sums,
        d.student.stride(0), d.teacher.stride(0), V, size, parts, d.ignore_index,
        SPLITS=triton.next_power_of_2(int(parts)), ODD=odd(d.student, d.teacher), **flags, **sweep.options(),
    )  # fmt: skip
    return sums


def token_statistics(d: DenseCall, partial: Tensor, mixture: Tensor | None, vocabulary: int) -> DenseTokens:
    """Join the parts of each row; `vocabulary` is the size S of the teacher's support."""
    N, splits = partial.shape[:2]
    new = partial.new_empty
    out = DenseTokens(new(4, N), new(N), new(N, TERMS.value))
    options = joining(splits)
    launch(wrap_triton(entropy_kl_tokens), (triton.cdiv(N, options["ROWS"]),),
        partial, mixture, d.labels, d.mask, d.scalars, *out, N, splits, math.log(vocabulary), d.ignore_index,
        HAS_LABELS=d.labels is not None, HAS_MASK=d.mask is not None, DIVERGENCE=d.divergence, WEIGHTING=d.weighting,
        **options,
    )  # fmt: skip
    return out


def logits_gradient(d: DenseCall, terms: Tensor, incoming: Tensor) -> Tensor:
    """∂/∂student of Σ incoming·loss, `incoming` one number per token or one for all, in the student's dtype."""
    (N, V), device = d.student.shape, d.student.device
    sweep = sweep_of("entropy_kl_gradient", device, d.student.element_size(), V)
    grad = torch.empty(N, V, dtype=d.student.dtype, device=device)
    launch(wrap_triton(entropy_kl_gradient), (N, triton.cdiv(V, sweep.step)),
        d.student, d.teacher, d.labels, d.mask, d.scalars, terms, incoming, grad,
        d.student.stride(0), d.teacher.stride(0), V, int(incoming.dim() > 0), V, sweep.step, d.ignore_index,
        ODD=odd(d.student, d.teacher, grad), **d.flags(), **sweep.options(),
    )  # fmt: skip
    return grad


def rows_at_once(d: DenseCall, incoming: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(stats, losses) of whole rows and their gradient in one kernel; `grad` (N, V) is written and may be the student
    itself."""
    (N, V), device = d.student.shape, d.student.device
    sweep = sweep_of("entropy_kl_row", device, d.student.element_size(), V)
    stats, losses = (torch.empty(shape, dtype=torch.float32, device=device) for shape in ((4, N), (N,)))
    launch(wrap_triton(entropy_kl_row), (N,),
        d.student, d.teacher, d.labels, d.mask, d.scalars, stats, losses, incoming, grad,
        d.student.stride(0), d.teacher.stride(0), grad.stride(0), int(incoming.dim() > 0), N, V, math.log(V),
        d.ignore_index, WEIGHTING=d.weighting, ODD=odd(d.student, d.teacher, grad), **d.flags(), **sweep.options(),
    )  # fmt: skip
    return stats, losses


def _split_rows(d: DenseCall, columns: Columns) -> DenseTokens:
    partial = columns.parts(partial_statistics(d), lambda own: joined(d, own))
    mixture = None
    if d.divergence == JSD.value:
        mixture = columns.parts(mixture_sums(d, partial), lambda own: own.sum(1))
    return token_statistics(d, partial, mixture, columns.count(d.student))


def _known_denominator(d: DenseCall, reduction: int, num_items: Tensor | None) -> Tensor | None:
    """1/denominator where it is known before the statistics are, else None."""
    device = d.student.device
    if reduction == SUM:
        return torch.ones((), device=device)
    if num_items is not None:
        return number_on(num_items, device).to(torch.float32).reciprocal()
    if d.weighting in (ENTROPY.value, INVERSE.value):
        return None
    valid = torch.ones(d.student.shape[0], dtype=torch.bool, device=device) if d.mask is None else d.mask
    valid = valid if d.labels is None else valid & (d.labels != d.ignore_index)
    return valid.sum(dtype=torch.float32).clamp(min=1).reciprocal()


def entropy_kl(
    student: Tensor, teacher: Tensor, labels: Tensor | None, token_mask: Tensor | None, scalars: Tensor,
    weighting: int, divergence: int, ignore_index: int, reduction: int, num_items: Tensor | None, need_student: bool,
    columns: Columns = WHOLE,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator's kernel: (loss, stats, ∂loss/∂student or an empty tensor)."""
    d = prepared(student, teacher, labels, token_mask, scalars, weighting, divergence, ignore_index, columns)
    want = need_student and reduction != NONE
    at_once = want and columns is WHOLE and fills_device(student)
    inverse = _known_denominator(d, reduction, num_items) if at_once else None
    if inverse is not None:
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        stats, losses = rows_at_once(d, inverse, grad)
        return reduced_loss(losses, stats, reduction, num_items)[0], stats, grad
    tokens = _split_rows(d, columns)
    if reduction == NONE:
        return tokens.losses, tokens.stats, student.new_empty(0)
    loss, inverse = reduced_loss(tokens.losses, tokens.stats, reduction, num_items)
    return loss, tokens.stats, logits_gradient(d, tokens.terms, inverse) if want else student.new_empty(0)


def entropy_kl_backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, labels: Tensor | None, token_mask: Tensor | None,
    scalars: Tensor, weighting: int, divergence: int, ignore_index: int, columns: Columns = WHOLE,
) -> Tensor:  # fmt: skip
    """∂/∂student of Σ grad_loss·loss, one incoming gradient per token."""
    d = prepared(student, teacher, labels, token_mask, scalars, weighting, divergence, ignore_index, columns)
    if columns is WHOLE and fills_device(student):
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        rows_at_once(d, grad_loss.contiguous(), grad)
        return grad
    return logits_gradient(d, _split_rows(d, columns).terms, grad_loss.contiguous())
