"""Sweeps of one program over a part of a row: statistics, mixture sums, gradient.

A program of LANES threads' worth of lanes takes LANES × VEC × UNROLL columns per step. A lane owns UNROLL times VEC
neighbouring columns, one or two 128-bit accesses each, so the sweep needs no exchange between threads until its end. A
part is [first, last) with `last − first` a multiple of the step unless it ends at V.

Rows of an odd V begin anywhere between the boundaries of such accesses. There (ODD) columns are counted from the last
boundary before the row, `lead` columns before its first: only the step in which it begins and the one in which it ends
are masked, and all other accesses are whole, as long as all tensors of the sweep begin at the same distance.
"""

# mypy: disable-error-code="assignment"
# Tuples of tiles grow in loops that the compiler unrolls.

from typing import NamedTuple

import triton
import triton.language as tl

from e3kernels.triton.statistics import (
    ADAPTIVE,
    FORWARD,
    JSD,
    LN_2,
    LOG2_E,
    START,
    fold_finite,
    fold_finite_pair,
    fold_pair,
    fold_student,
    in_nats,
    is_finite,
    logits_tile,
    merge_pair,
    merge_student,
    no_finite_pair,
    no_pair,
    no_student,
    no_sums,
    none_finite,
    pair_in_nats,
    row_from,
    scaled_logits,
    unit,
)


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
def lane_columns(LANES: tl.constexpr, VEC: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def label_logit(row, label, first, last):
    """The label's logit at T = 1 if its column is in [first, last), else 0."""
    inside = (label >= first) & (label < last)
    y, _ = scaled_logits(tl.load(row.ptr + label, mask=inside, other=0.0), row.transform)
    return tl.where(inside, y, 0.0)


class Span(NamedTuple):
    """Columns [first, last) of a row that takes [lead, end). Steps without a mask are [inner, outer), tiles with one
    [first, inner) and [outer, last); range(edge, bound, stride) are the beginnings of those that hold any column."""

    first: tl.tensor
    last: tl.tensor
    inner: tl.tensor
    outer: tl.tensor
    edge: tl.tensor
    bound: tl.tensor
    stride: tl.tensor
    lead: tl.tensor
    end: tl.tensor


@triton.jit
def lead_of(ptr, VEC: tl.constexpr):
    """How many elements `ptr` lies behind the last multiple of VEC of them."""
    SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    return (ptr.to(tl.int64) // SIZE % VEC).to(tl.int32)


@triton.jit
def edge_width(ODD: tl.constexpr, VEC: tl.constexpr):
    """Columns of a lane in tiles with a mask: where each is an access of its own, many would fill the registers."""
    return min(2, VEC) if ODD else VEC


@triton.jit
def span_of(first, last, V, a, b, c, ODD: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr):
    """(the span of the part [first, last), the row's last if it ends at V; whether it has steps without a mask), for
    rows that begin at the pointers a, b and c."""
    STEP: tl.constexpr = LANES * VEC * UNROLL
    lead = tl.full([], 0, tl.int32)
    together = tl.full([], True, tl.int1)
    inner = tl.cast(first, tl.int32)
    if ODD:
        lead = lead_of(a, VEC)
        together = (lead == lead_of(b, VEC)) & (lead == lead_of(c, VEC))
        lead = tl.where(together, lead, 0)
    last = tl.where(last == V, V + lead, last)
    if ODD:
        inner = tl.where((lead > 0) & (first == 0), tl.minimum(LANES * edge_width(ODD, VEC), last), inner)
    outer = tl.where(together, inner + (last - inner) // STEP * STEP, first)
    edge = tl.where(inner > first, first, outer)
    bound = tl.minimum(last, outer + 1)
    return Span(first, last, inner, outer, edge, bound, tl.maximum(outer - edge, 1), lead, V + lead), together


@triton.jit
def edge_stop(begin, span):
    """Where the tiles with a mask end that begin at `begin`."""
    return tl.where(begin < span.inner, span.inner, span.last)


@triton.jit
def tile_of(ptr, first, span, MASKED: tl.constexpr, ODD: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """(the pointers, the columns, which of them are the row's) of the tile that begins at column `first`."""
    at = ptr + first
    if ODD and not MASKED:
        at = tl.multiple_of(at, 16)
    columns = first + lane_columns(LANES, VEC)
    return at + lane_columns(LANES, VEC), columns, (columns >= span.lead) & (columns < span.end)


@triton.jit
def load_tile(at, inside, MASKED: tl.constexpr):
    """A tile of inputs; 0 outside the mask."""
    return tl.load(at, mask=inside, other=0.0) if MASKED else tl.load(at)


@triton.jit
def store_tile(at, tile, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(at, tile, mask=inside)
    else:
        tl.store(at, tile)


@triton.jit
def packed(row, MASKED: tl.constexpr):
    """Whether a step's inputs are taken in pairs."""
    return not MASKED and row.ptr.dtype.element_ty == tl.bfloat16


@triton.jit
def step_columns(start, PACKED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr):
    """The columns of each tile of the step that begins at `start`: (lanes, columns of a lane), or half as many of the
    even ones and of the odd ones."""
    columns = ()
    for part in tl.static_range(UNROLL):
        first = start + part * LANES * VEC
        if PACKED:
            even = first + 2 * lane_columns(LANES, VEC // 2)
            columns += (even, even + 1)
        else:
            columns += (first + lane_columns(LANES, VEC),)
    return columns


@triton.jit
def finite_tiles(
    row, start, span,
    MASKED: tl.constexpr, ODD: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A step's tiles of z, the logits at T = 1 but for the factor `unit`; START outside the mask.

    Two bf16 are the halves of a word: two instructions make them fp32, where the compiler takes three.
    """
    tiles = ()
    for part in tl.static_range(UNROLL):
        first = start + part * LANES * VEC
        if packed(row, MASKED):
            pairs = tl.multiple_of((row.ptr + first).to(tl.pointer_type(tl.int32)), 16)
            words = tl.load(pairs + lane_columns(LANES, VEC // 2))
            x = ((words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True))
        else:
            at, _, inside = tile_of(row.ptr, first, span, MASKED, ODD, LANES, VEC)
            x = (load_tile(at, inside, MASKED).to(tl.float32),)
        for i in tl.static_range(2 if packed(row, MASKED) else 1):
            z = x[i] if row.transform.CAP == 0 else scaled_logits(x[i], row.transform)[0]
            tiles += (tl.where(inside, z, START) if MASKED else z,)
    return tiles


@triton.jit
def _fold_steps(
    pair, student, teacher, start, stop, stride, span, fs, f1, ft,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, MASKED: tl.constexpr, ODD: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, stride):
        zs = finite_tiles(student, first, span, MASKED, ODD, LANES, VEC, UNROLL)
        zt = finite_tiles(teacher, first, span, MASKED, ODD, LANES, VEC, UNROLL)
        pair = fold_finite_pair(pair, zs, zt, fs, f1, ft, DIVERGENCE, HAS_LABELS, len(zs))
    return pair


@triton.jit
def sweep_any_pair(
    student, teacher, span, inverse_temperature,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The statistics of both models on a span, whatever the logits are."""
    pair = no_pair(LANES)
    for start in range(span.first, span.last, LANES * VEC):
        columns = start + lane_columns(LANES, VEC)
        inside = (columns >= span.lead) & (columns < span.end)
        ys = logits_tile(student, columns, inside)
        yt = logits_tile(teacher, columns, inside)
        pair = fold_pair(pair, ys, yt, inverse_temperature, DIVERGENCE, HAS_LABELS)
    return merge_pair(pair, inverse_temperature, DIVERGENCE, 0)


@triton.jit
def sweep_pair(
    student, teacher, first, last, V, inverse_temperature,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, ODD: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The statistics of both models on the columns [first, last)."""
    STEP: tl.constexpr = LANES * VEC * UNROLL
    EDGE: tl.constexpr = edge_width(ODD, VEC)
    span, together = span_of(first, last, V, student.ptr, teacher.ptr, student.ptr, ODD, LANES, VEC, UNROLL)
    student, teacher = row_from(student, span.lead), row_from(teacher, span.lead)
    pair = no_sums()
    if together:
        unit_s, unit_t = unit(student.transform), unit(teacher.transform)
        fs, f1, ft = unit_s * inverse_temperature * LOG2_E, unit_s * LOG2_E, unit_t * inverse_temperature * LOG2_E
        lanes = no_finite_pair(fs, f1, ft, LANES)
        for begin in range(span.edge, span.bound, span.stride):
            lanes = _fold_steps(
                lanes, student, teacher, begin, edge_stop(begin, span), LANES * EDGE, span, fs, f1, ft,
                DIVERGENCE, HAS_LABELS, True, ODD, LANES, EDGE, 1,
            )  # fmt: skip
        lanes = _fold_steps(
            lanes, student, teacher, span.inner, span.outer, STEP, span, fs, f1, ft,
            DIVERGENCE, HAS_LABELS, False, ODD, LANES, VEC, UNROLL,
        )  # fmt: skip
        pair = merge_pair(pair_in_nats(lanes, fs, f1, ft, unit_s, unit_t), inverse_temperature, DIVERGENCE, 0)
    if not is_finite(pair):
        pair = sweep_any_pair(student, teacher, span, inverse_temperature, DIVERGENCE, HAS_LABELS, LANES, EDGE)
    return pair


@triton.jit
def _next(ids, start, end):
    """The first of `ids` from `start` on, or `end`."""
    return tl.min(tl.where(ids >= start, ids, end), axis=0)


@triton.jit
def _without(tiles, columns, column, TILES: tl.constexpr):
    """The tiles with −∞ in `column`."""
    out = ()
    for i in tl.static_range(TILES):
        out += (tl.where(columns[i] == column, float("-inf"), tiles[i]),)
    return out


@triton.jit
def _unstored_step(
    student, hard, row, ids, upcoming, start, span, f, f1,
    HAS_LABELS: tl.constexpr, MASKED: tl.constexpr, ODD: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    z = finite_tiles(row, start, span, MASKED, ODD, LANES, VEC, UNROLL)
    columns = step_columns(start, packed(row, MASKED), LANES, VEC, UNROLL)
    stop = tl.minimum(start + LANES * VEC * UNROLL, span.end)
    while upcoming < stop:
        z = _without(z, columns, upcoming, len(z))
        upcoming = _next(ids, upcoming + 1, span.end)
    student, _, _, _ = fold_finite(student, z, f, len(z))
    if HAS_LABELS:
        hard, _, _, _ = fold_finite(hard, z, f1, len(z))
    return student, hard, upcoming


@triton.jit
def sweep_finite_unstored(
    row, ids, span, inverse_temperature, HAS_LABELS: tl.constexpr, ODD: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The statistics of the columns of a span that are not among `ids`; nothing where all logits are below START."""
    scale = unit(row.transform)
    f, f1 = scale * inverse_temperature * LOG2_E, scale * LOG2_E
    student, hard = none_finite(f, LANES), none_finite(f1, LANES)
    STEP: tl.constexpr = LANES * VEC * UNROLL
    EDGE: tl.constexpr = edge_width(ODD, VEC)
    for begin in range(span.edge, span.bound, span.stride):
        upcoming = _next(ids, begin, span.end)
        for start in range(begin, edge_stop(begin, span), LANES * EDGE):
            student, hard, upcoming = _unstored_step(
                student, hard, row, ids, upcoming, start, span, f, f1, HAS_LABELS, True, ODD, LANES, EDGE, 1
            )
    upcoming = _next(ids, span.inner, span.end)
    for start in range(span.inner, span.outer, STEP):
        student, hard, upcoming = _unstored_step(
            student, hard, row, ids, upcoming, start, span, f, f1, HAS_LABELS, False, ODD, LANES, VEC, UNROLL
        )
    return merge_student(in_nats(student, hard, f, f1, scale), inverse_temperature, 0)


@triton.jit
def sweep_any_unstored(
    row, ids, span, inverse_temperature, HAS_LABELS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr
):
    """The same, whatever the logits are."""
    student = no_student(LANES)
    upcoming = _next(ids, span.first, span.end)
    for start in range(span.first, span.last, LANES * VEC):
        columns = start + lane_columns(LANES, VEC)
        ys = logits_tile(row, columns, (columns >= span.lead) & (columns < span.end))
        while upcoming < tl.minimum(start + LANES * VEC, span.end):
            ys = tl.where(columns == upcoming, float("-inf"), ys)
            upcoming = _next(ids, upcoming + 1, span.end)
        student = fold_student(student, ys, inverse_temperature, HAS_LABELS)
    return merge_student(student, inverse_temperature, 0)


@triton.jit
def sweep_unstored(
    row, ids, first, last, V, inverse_temperature,
    HAS_LABELS: tl.constexpr, ODD: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The student's statistics of the columns [first, last) that are not among `ids`; an id of V is none."""
    span, _ = span_of(first, last, V, row.ptr, row.ptr, row.ptr, ODD, LANES, VEC, UNROLL)
    row = row_from(row, span.lead)
    ids += span.lead
    student = sweep_finite_unstored(row, ids, span, inverse_temperature, HAS_LABELS, ODD, LANES, VEC, UNROLL)
    if student.total == 0.0:
        student = sweep_any_unstored(row, ids, span, inverse_temperature, HAS_LABELS, LANES, edge_width(ODD, VEC))
    return student


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


class Factors(NamedTuple):
    """From logits at T = 1 to bits, the normalisers in bits, and the slopes of the divergence and the cross-entropy."""

    bits: tl.tensor
    log_s: tl.tensor
    log_1: tl.tensor
    log_t: tl.tensor
    divergence: tl.tensor
    hard: tl.tensor


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


@triton.jit
def sweep_zero(
    grad_row, first, last, V, ODD: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr
):
    """Write zeros on the columns [first, last): the gradient of a token that does not count."""
    span, _ = span_of(first, last, V, grad_row, grad_row, grad_row, ODD, LANES, VEC, UNROLL)
    grad_row -= span.lead
    zero = tl.zeros([LANES, VEC], grad_row.dtype.element_ty)
    for start in range(span.first, span.last, LANES * VEC):
        columns = start + lane_columns(LANES, VEC)
        tl.store(grad_row + columns, zero, mask=(columns >= span.lead) & (columns < span.end))
