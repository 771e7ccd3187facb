"""Sweeps of one program over a part of a row: statistics, mixture sums, gradient.

A program of LANES threads' worth of lanes takes LANES × VEC × UNROLL columns per step. A lane owns VEC neighbouring
columns, one or two 128-bit accesses, so the sweep needs no exchange between threads until its end. A part is
[first, last) with `last − first` a multiple of the step unless it ends at V: then `columns < V` is the only mask, and
its alignment is known to the compiler.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from e3kernels.triton.statistics import (
    FORWARD,
    REVERSE,
    fold_pair,
    fold_student,
    logits_tile,
    merge_pair,
    merge_student,
    no_pair,
    no_student,
    scaled_logits,
)


class Terms(NamedTuple):
    """What the gradient of one token's loss needs beside its logits; `term` is KL(q‖p) or KL(q‖r), unused if forward.

    log Z_s = top_s/T + log_s, log Z_s(T=1) = top_s + log_1, log Z_t = top_t/T + log_t: added up, a maximum of 1e38
    would swallow the rest. kd and ce are the factors of the divergence and of the cross-entropy in the loss.
    """

    top_s: tl.tensor
    log_s: tl.tensor
    log_1: tl.tensor
    top_t: tl.tensor
    log_t: tl.tensor
    term: tl.tensor
    kd: tl.tensor
    ce: tl.tensor


TERMS: tl.constexpr = tl.constexpr(len(Terms._fields))


@triton.jit
def load_terms(p):
    return Terms(
        tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), tl.load(p + 4), tl.load(p + 5), tl.load(p + 6),
        tl.load(p + 7),
    )  # fmt: skip


@triton.jit
def store_terms(p, mask, terms):
    for i in tl.static_range(TERMS):
        tl.store(p + i, terms[i], mask=mask)


@triton.jit
def lane_columns(LANES: tl.constexpr, VEC: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def label_logit(row, label, first, last):
    """The label's logit at T = 1 if its column is in [first, last), else 0."""
    inside = (label >= first) & (label < last)
    y, _ = scaled_logits(tl.load(row.ptr + label, mask=inside, other=0.0), row.transform)
    return tl.where(inside, y, 0.0)


@triton.jit
def sweep_unstored(
    student, ids, first, last, V, inverse_temperature,
    HAS_LABELS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The student's statistics of the columns [first, last) that are not among `ids`; an id of V is none."""
    statistics = no_student(LANES)
    upcoming = tl.min(ids, axis=0)
    for start in range(first, last, LANES * VEC * UNROLL):
        for part in tl.static_range(UNROLL):
            columns = start + part * LANES * VEC + lane_columns(LANES, VEC)
            ys = logits_tile(student, columns, columns < V)
            while upcoming < tl.minimum(start + (part + 1) * LANES * VEC, V):
                ys = tl.where(columns == upcoming, float("-inf"), ys)
                upcoming = tl.min(tl.where(ids > upcoming, ids, V), axis=0)
            statistics = fold_student(statistics, ys, inverse_temperature, HAS_LABELS)
    return merge_student(statistics, inverse_temperature, 0)


@triton.jit
def sweep_pair(
    student, teacher, first, last, V, inverse_temperature,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The statistics of both models on the columns [first, last)."""
    pair = no_pair(LANES)
    for start in range(first, last, LANES * VEC * UNROLL):
        for part in tl.static_range(UNROLL):
            columns = start + part * LANES * VEC + lane_columns(LANES, VEC)
            ys = logits_tile(student, columns, columns < V)
            yt = logits_tile(teacher, columns, columns < V)
            pair = fold_pair(pair, ys, yt, inverse_temperature, DIVERGENCE, HAS_LABELS)
    return merge_pair(pair, inverse_temperature, DIVERGENCE, 0)


@triton.jit
def mixture_gaps(log_q, log_p, mix):
    """(log q − log r, log p − log r) for r = β·p + (1−β)·q; 0 where the own probability is 0."""
    top = tl.maximum(log_q, log_p)
    log_r = top + tl.log(mix.beta * tl.exp(log_p - top) + mix.rest * tl.exp(log_q - top))
    none = float("-inf")
    return tl.where(log_q == none, 0.0, log_q - log_r), tl.where(log_p == none, 0.0, log_p - log_r)


@triton.jit
def sweep_mixture(
    student, teacher, first, last, V, top_s, log_s, top_t, log_t, inverse_temperature, mix,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """(Σ q(log q − log r), Σ p(log p − log r)) of the columns [first, last); log Z is top/T + log S of both models."""
    from_student = tl.zeros([LANES], tl.float32)
    from_teacher = tl.zeros([LANES], tl.float32)
    for start in range(first, last, LANES * VEC * UNROLL):
        for part in tl.static_range(UNROLL):
            columns = start + part * LANES * VEC + lane_columns(LANES, VEC)
            ys = logits_tile(student, columns, columns < V)
            yt = logits_tile(teacher, columns, columns < V)
            log_q = (ys - top_s) * inverse_temperature - log_s
            log_p = (yt - top_t) * inverse_temperature - log_t
            gap_q, gap_p = mixture_gaps(log_q, log_p, mix)
            from_student += tl.sum(tl.exp(log_q) * gap_q, axis=1)
            from_teacher += tl.sum(tl.exp(log_p) * gap_p, axis=1)
    return tl.sum(from_student, axis=0), tl.sum(from_teacher, axis=0)


@triton.jit
def sweep_gradient(
    student, teacher, grad_row, first, last, V, terms, incoming, label, inverse_temperature, mix,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write incoming·(kd·∂divergence/∂x + ce·∂CE/∂x) on the columns [first, last).

    A zero coefficient removes its term; a zero incoming gradient leaves NaN what it is.
    """
    divergence_slope = terms.kd * incoming * inverse_temperature
    hard_slope = terms.ce * incoming
    for start in range(first, last, LANES * VEC * UNROLL):
        for part in tl.static_range(UNROLL):
            columns = start + part * LANES * VEC + lane_columns(LANES, VEC)
            mask = columns < V
            x = tl.load(student.ptr + columns, mask=mask, other=0.0)
            y, slope = scaled_logits(x, student.transform)
            log_q = (y - terms.top_s) * inverse_temperature - terms.log_s
            yt = logits_tile(teacher, columns, mask)
            log_p = (yt - terms.top_t) * inverse_temperature - terms.log_t
            q = tl.exp(log_q)
            if DIVERGENCE == FORWARD:
                g = q - tl.exp(log_p)
            elif DIVERGENCE == REVERSE:
                g = tl.where(q > 0, q * (log_q - log_p - terms.term), q)
            else:
                gap_q, _ = mixture_gaps(log_q, log_p, mix)
                g = mix.rest * q * (gap_q - terms.term)
            g = tl.where(terms.kd == 0.0, 0.0, g * divergence_slope)
            if HAS_LABELS:
                hard = tl.exp((y - terms.top_s) - terms.log_1) - tl.where(columns == label, 1.0, 0.0)
                g += tl.where(terms.ce == 0.0, 0.0, hard_slope * hard)
            tl.store(grad_row + columns, (g * slope).to(grad_row.dtype.element_ty), mask=mask)


@triton.jit
def sweep_zero(grad_row, first, last, V, LANES: tl.constexpr, VEC: tl.constexpr):
    """Write zeros on the columns [first, last): the gradient of a token that does not count."""
    for start in range(first, last, LANES * VEC):
        columns = start + lane_columns(LANES, VEC)
        zero = tl.zeros([LANES, VEC], grad_row.dtype.element_ty)
        tl.store(grad_row + columns, zero, mask=columns < V)
