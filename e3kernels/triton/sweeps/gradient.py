"""The sweeps that know the normalisers: the sums of the mixture, and the gradient."""

from typing import NamedTuple

import triton
import triton.language as tl

from e3kernels.triton.statistics import ADAPTIVE, FORWARD, JSD, LN_2, LOG2_E, row_from, scaled_logits
from e3kernels.triton.sweeps.span import edge_stop, edge_width, load_tile, span_of, store_tile, tile_of


class Terms(NamedTuple):
    """What the gradient of one token's loss needs beside its logits; `term` is KL(q‖p) or KL(q‖r), unused if forward,
    and `share` the weight of the forward part of the adaptive divergence.

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
    share: tl.tensor


TERMS: tl.constexpr = tl.constexpr(len(Terms._fields))


@triton.jit
def load_terms(p):
    return Terms(
        tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), tl.load(p + 4), tl.load(p + 5), tl.load(p + 6),
        tl.load(p + 7), tl.load(p + 8),
    )  # fmt: skip


@triton.jit
def store_terms(p, mask, terms):
    for i in tl.static_range(TERMS):
        tl.store(p + i, terms[i], mask=mask)


@triton.jit
def mixture_gaps(log_q, log_p, mix):
    """(log q − log r, log p − log r) for r = β·p + (1−β)·q; 0 where the own probability is 0."""
    top = tl.maximum(log_q, log_p)
    log_r = top + tl.log(mix.beta * tl.exp(log_p - top) + mix.rest * tl.exp(log_q - top))
    none = float("-inf")
    return tl.where(log_q == none, 0.0, log_q - log_r), tl.where(log_p == none, 0.0, log_p - log_r)


@triton.jit
def _mixture_step(
    sums, student, teacher, start, span, top_s, log_s, top_t, log_t, inverse_temperature, mix,
    MASKED: tl.constexpr, ODD: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    from_student, from_teacher = sums
    for part in tl.static_range(UNROLL):
        first = start + part * LANES * VEC
        at, _, inside = tile_of(student.ptr, first, span, MASKED, ODD, LANES, VEC)
        ys, _ = scaled_logits(load_tile(at, inside, MASKED), student.transform)
        at, _, _ = tile_of(teacher.ptr, first, span, MASKED, ODD, LANES, VEC)
        yt, _ = scaled_logits(load_tile(at, inside, MASKED), teacher.transform)
        log_q = (ys - top_s) * inverse_temperature - log_s
        log_p = (yt - top_t) * inverse_temperature - log_t
        if MASKED:
            log_q = tl.where(inside, log_q, float("-inf"))
            log_p = tl.where(inside, log_p, float("-inf"))
        gap_q, gap_p = mixture_gaps(log_q, log_p, mix)
        from_student += tl.sum(tl.exp(log_q) * gap_q, axis=1)
        from_teacher += tl.sum(tl.exp(log_p) * gap_p, axis=1)
    return from_student, from_teacher


@triton.jit
def sweep_mixture(
    student, teacher, first, last, V, top_s, log_s, top_t, log_t, inverse_temperature, mix,
    ODD: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """(Σ q(log q − log r), Σ p(log p − log r)) of the columns [first, last); log Z is top/T + log S of both models."""
    STEP: tl.constexpr = LANES * VEC * UNROLL
    EDGE: tl.constexpr = edge_width(ODD, VEC)
    span, _ = span_of(first, last, V, student.ptr, teacher.ptr, student.ptr, ODD, LANES, VEC, UNROLL)
    student, teacher = row_from(student, span.lead), row_from(teacher, span.lead)
    sums = (tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32))
    for begin in range(span.edge, span.bound, span.stride):
        for start in range(begin, edge_stop(begin, span), LANES * EDGE):
            sums = _mixture_step(
                sums, student, teacher, start, span, top_s, log_s, top_t, log_t, inverse_temperature, mix,
                True, ODD, LANES, EDGE, 1,
            )  # fmt: skip
    for start in range(span.inner, span.outer, STEP):
        sums = _mixture_step(
            sums, student, teacher, start, span, top_s, log_s, top_t, log_t, inverse_temperature, mix,
            False, ODD, LANES, VEC, UNROLL,
        )  # fmt: skip
    return tl.sum(sums[0], axis=0), tl.sum(sums[1], axis=0)


class Factors(NamedTuple):
    """From logits at T = 1 to bits, the normalisers in bits, and the slopes of the divergence and the cross-entropy."""

    bits: tl.tensor
    log_s: tl.tensor
    log_1: tl.tensor
    log_t: tl.tensor
    divergence: tl.tensor
    hard: tl.tensor


@triton.jit
def _gradient_step(
    student, teacher, grad, start, span, terms, label, factors, mix,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, MASKED: tl.constexpr, ODD: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    for part in tl.static_range(UNROLL):
        first = start + part * LANES * VEC
        at, columns, inside = tile_of(student.ptr, first, span, MASKED, ODD, LANES, VEC)
        y, slope = scaled_logits(load_tile(at, inside, MASKED), student.transform)
        at, _, _ = tile_of(teacher.ptr, first, span, MASKED, ODD, LANES, VEC)
        yt, _ = scaled_logits(load_tile(at, inside, MASKED), teacher.transform)
        g = _slope(y, yt, terms, factors, mix, DIVERGENCE)
        if HAS_LABELS:
            hard = tl.exp2((y - terms.top_s) * LOG2_E - factors.log_1) - tl.where(columns == label, 1.0, 0.0)
            g += tl.where(terms.ce == 0.0, 0.0, factors.hard * hard)
        at, _, _ = tile_of(grad, first, span, MASKED, ODD, LANES, VEC)
        store_tile(at, (g * slope).to(grad.dtype.element_ty), inside, MASKED)


@triton.jit
def _slope(y, yt, terms, factors, mix, DIVERGENCE: tl.constexpr):
    """incoming·kd·∂divergence/∂y."""
    log_q = (y - terms.top_s) * factors.bits - factors.log_s
    log_p = (yt - terms.top_t) * factors.bits - factors.log_t
    q = tl.exp2(log_q)
    if DIVERGENCE == FORWARD:
        g = q - tl.exp2(log_p)
    elif DIVERGENCE == JSD:
        gap_q, _ = mixture_gaps(log_q * LN_2, log_p * LN_2, mix)
        g = mix.rest * q * (gap_q - terms.term)
    else:
        g = tl.where(q > 0, q * ((log_q - log_p) * LN_2 - terms.term), q)
        if DIVERGENCE == ADAPTIVE:
            g = tl.where(terms.share == 1.0, 0.0, g * (1.0 - terms.share)) + terms.share * (q - tl.exp2(log_p))
    return tl.where(terms.kd == 0.0, 0.0, g * factors.divergence)


@triton.jit
def sweep_gradient(
    student, teacher, grad_row, first, last, V, terms, incoming, label, inverse_temperature, mix,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, ODD: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write incoming·(kd·∂divergence/∂x + ce·∂CE/∂x) on the columns [first, last).

    A zero coefficient removes its term; a zero incoming gradient leaves NaN what it is.
    """
    STEP: tl.constexpr = LANES * VEC * UNROLL
    EDGE: tl.constexpr = edge_width(ODD, VEC)
    span, _ = span_of(first, last, V, student.ptr, teacher.ptr, grad_row, ODD, LANES, VEC, UNROLL)
    student, teacher = row_from(student, span.lead), row_from(teacher, span.lead)
    grad_row -= span.lead
    label += span.lead
    factors = Factors(
        inverse_temperature * LOG2_E, terms.log_s * LOG2_E, terms.log_1 * LOG2_E, terms.log_t * LOG2_E,
        terms.kd * incoming * inverse_temperature, terms.ce * incoming,
    )  # fmt: skip
    for begin in range(span.edge, span.bound, span.stride):
        for start in range(begin, edge_stop(begin, span), LANES * EDGE):
            _gradient_step(
                student, teacher, grad_row, start, span, terms, label, factors, mix,
                DIVERGENCE, HAS_LABELS, True, ODD, LANES, EDGE, 1,
            )  # fmt: skip
    for start in range(span.inner, span.outer, STEP):
        _gradient_step(
            student, teacher, grad_row, start, span, terms, label, factors, mix,
            DIVERGENCE, HAS_LABELS, False, ODD, LANES, VEC, UNROLL,
        )  # fmt: skip
