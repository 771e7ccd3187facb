"""Sweeps of one program over a part of a row: statistics, mixture sums, gradient.

A program of LANES threads' worth of lanes takes LANES × VEC × UNROLL columns a step. A lane owns VEC neighbouring
columns, one or two 128-bit accesses, so the sweep needs no exchange between threads until its end. A part is
[first, last) with `last − first` a multiple of the step unless it ends at V: then `columns < V` is the only mask, and
its alignment is known to the compiler.
"""

import triton
import triton.language as tl

from e3kernels.triton.statistics import (
    FORWARD,
    LOWEST,
    PAIR_FIELDS,
    REVERSE,
    fold_pair,
    fold_student,
    logits_tile,
    merge_pair,
    merge_student,
    scaled_logits,
)


@triton.jit
def lane_columns(LANES: tl.constexpr, VEC: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def label_logit(row_ptr, label, first, last, scale, softcap, CAP: tl.constexpr):
    """The label's logit at T = 1 if its column is in [first, last), else 0."""
    inside = (label >= first) & (label < last)
    y, _ = scaled_logits(tl.load(row_ptr + label, mask=inside, other=0.0), scale, softcap, CAP)
    return tl.where(inside, y, 0.0)


@triton.jit
def sweep_unstored(
    student_row, ids, first, last, V, inverse_temperature, scale, softcap,
    HAS_LABELS: tl.constexpr, CAP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """(my, S_s, C) of the columns [first, last) that are not among `ids`; an id of V is none."""
    my = tl.full([LANES], LOWEST, tl.float32)
    ss = tl.zeros([LANES], tl.float32)
    cs = tl.zeros([LANES], tl.float32)
    upcoming = tl.min(ids, axis=0)
    for start in range(first, last, LANES * VEC * UNROLL):
        for part in tl.static_range(UNROLL):
            columns = start + part * LANES * VEC + lane_columns(LANES, VEC)
            ys = logits_tile(student_row, columns, columns < V, scale, softcap, CAP)
            while upcoming < tl.minimum(start + (part + 1) * LANES * VEC, V):
                ys = tl.where(columns == upcoming, float("-inf"), ys)
                upcoming = tl.min(tl.where(ids > upcoming, ids, V), axis=0)
            my, ss, cs = fold_student(my, ss, cs, ys, inverse_temperature, HAS_LABELS)
    return merge_student(my, ss, cs, inverse_temperature, 0)


@triton.jit
def sweep_pair(
    student_row, teacher_row, first, last, V, inverse_temperature, scale_s, scale_t, softcap_s, softcap_t,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """(my, S_s, C, mt, S_t, A, B, gap) of the columns [first, last)."""
    my = tl.full([LANES], LOWEST, tl.float32)
    mt = tl.full([LANES], LOWEST, tl.float32)
    gap = tl.full([LANES], float("-inf"), tl.float32)
    ss = tl.zeros([LANES], tl.float32)
    cs = tl.zeros([LANES], tl.float32)
    st = tl.zeros([LANES], tl.float32)
    a = tl.zeros([LANES], tl.float32)
    b = tl.zeros([LANES], tl.float32)
    for start in range(first, last, LANES * VEC * UNROLL):
        for part in tl.static_range(UNROLL):
            columns = start + part * LANES * VEC + lane_columns(LANES, VEC)
            ys = logits_tile(student_row, columns, columns < V, scale_s, softcap_s, CAP_S)
            yt = logits_tile(teacher_row, columns, columns < V, scale_t, softcap_t, CAP_T)
            my, ss, cs, mt, st, a, b, gap = fold_pair(
                my, ss, cs, mt, st, a, b, gap, ys, yt, inverse_temperature, DIVERGENCE, HAS_LABELS
            )
    return merge_pair(my, ss, cs, mt, st, a, b, gap, inverse_temperature, DIVERGENCE, 0)


@triton.jit
def mixture_gaps(log_q, log_p, beta, rest):
    """(log q − log r, log p − log r) for r = β·p + (1−β)·q, `rest` being 1 − β; 0 where the own probability is 0."""
    top = tl.maximum(log_q, log_p)
    log_r = top + tl.log(beta * tl.exp(log_p - top) + rest * tl.exp(log_q - top))
    none = float("-inf")
    return tl.where(log_q == none, 0.0, log_q - log_r), tl.where(log_p == none, 0.0, log_p - log_r)


@triton.jit
def sweep_mixture(
    student_row, teacher_row, first, last, V, my, log_ss, mt, log_st, inverse_temperature, beta, rest,
    scale_s, scale_t, softcap_s, softcap_t,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """(Σ q(log q − log r), Σ p(log p − log r)) of the columns [first, last); log Z is m/T + log S of both models."""
    from_student = tl.zeros([LANES], tl.float32)
    from_teacher = tl.zeros([LANES], tl.float32)
    for start in range(first, last, LANES * VEC * UNROLL):
        for part in tl.static_range(UNROLL):
            columns = start + part * LANES * VEC + lane_columns(LANES, VEC)
            ys = logits_tile(student_row, columns, columns < V, scale_s, softcap_s, CAP_S)
            yt = logits_tile(teacher_row, columns, columns < V, scale_t, softcap_t, CAP_T)
            log_q = (ys - my) * inverse_temperature - log_ss
            log_p = (yt - mt) * inverse_temperature - log_st
            gap_q, gap_p = mixture_gaps(log_q, log_p, beta, rest)
            from_student += tl.sum(tl.exp(log_q) * gap_q, axis=1)
            from_teacher += tl.sum(tl.exp(log_p) * gap_p, axis=1)
    return tl.sum(from_student, axis=0), tl.sum(from_teacher, axis=0)


@triton.jit
def sweep_gradient(
    student_row, teacher_row, grad_row, first, last, V, my, log_ss, log_cs, mt, log_st, term, kd, ce, incoming, label,
    inverse_temperature, beta, rest, scale_s, scale_t, softcap_s, softcap_t,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write incoming·(kd·∂divergence/∂x + ce·∂CE/∂x) on the columns [first, last); `term` is KL(q‖p) or KL(q‖r).

    log Z_s = my/T + log S_s, log Z_s(T=1) = my + log C, log Z_t = mt/T + log S_t: added up, a maximum of 1e38 would
    swallow the rest.

    A zero coefficient removes its term; a zero incoming gradient leaves NaN what it is.
    """
    divergence_slope = kd * incoming * inverse_temperature
    hard_slope = ce * incoming
    for start in range(first, last, LANES * VEC * UNROLL):
        for part in tl.static_range(UNROLL):
            columns = start + part * LANES * VEC + lane_columns(LANES, VEC)
            mask = columns < V
            x = tl.load(student_row + columns, mask=mask, other=0.0)
            y, slope = scaled_logits(x, scale_s, softcap_s, CAP_S)
            log_q = (y - my) * inverse_temperature - log_ss
            yt = logits_tile(teacher_row, columns, mask, scale_t, softcap_t, CAP_T)
            log_p = (yt - mt) * inverse_temperature - log_st
            q = tl.exp(log_q)
            if DIVERGENCE == FORWARD:
                g = q - tl.exp(log_p)
            elif DIVERGENCE == REVERSE:
                g = tl.where(q > 0, q * (log_q - log_p - term), q)
            else:
                gap_q, _ = mixture_gaps(log_q, log_p, beta, rest)
                g = rest * q * (gap_q - term)
            g = tl.where(kd == 0.0, 0.0, g * divergence_slope)
            if HAS_LABELS:
                hard = tl.exp((y - my) - log_cs) - tl.where(columns == label, 1.0, 0.0)
                g += tl.where(ce == 0.0, 0.0, hard_slope * hard)
            tl.store(grad_row + columns, (g * slope).to(grad_row.dtype.element_ty), mask=mask)


@triton.jit
def sweep_zero(grad_row, first, last, V, LANES: tl.constexpr, VEC: tl.constexpr):
    """Write zeros on the columns [first, last): the gradient of a token that does not count."""
    for start in range(first, last, LANES * VEC):
        columns = start + lane_columns(LANES, VEC)
        zero = tl.zeros([LANES, VEC], grad_row.dtype.element_ty)
        tl.store(grad_row + columns, zero, mask=columns < V)


@triton.jit
def load_pair(partial_ptr, index, mask):
    """The fields of partial statistics; an absent split holds the neutral element."""
    p = partial_ptr + index * PAIR_FIELDS
    my = tl.load(p, mask=mask, other=LOWEST)
    ss = tl.load(p + 1, mask=mask, other=0.0)
    cs = tl.load(p + 2, mask=mask, other=0.0)
    y_label = tl.load(p + 3, mask=mask, other=0.0)
    mt = tl.load(p + 4, mask=mask, other=LOWEST)
    st = tl.load(p + 5, mask=mask, other=0.0)
    a = tl.load(p + 6, mask=mask, other=0.0)
    b = tl.load(p + 7, mask=mask, other=0.0)
    gap = tl.load(p + 8, mask=mask, other=float("-inf"))
    return my, ss, cs, y_label, mt, st, a, b, gap


@triton.jit
def store_pair(p, mask, my, ss, cs, y_label, mt, st, a, b, gap):
    tl.store(p, my, mask=mask)
    tl.store(p + 1, ss, mask=mask)
    tl.store(p + 2, cs, mask=mask)
    tl.store(p + 3, y_label, mask=mask)
    tl.store(p + 4, mt, mask=mask)
    tl.store(p + 5, st, mask=mask)
    tl.store(p + 6, a, mask=mask)
    tl.store(p + 7, b, mask=mask)
    tl.store(p + 8, gap, mask=mask)
