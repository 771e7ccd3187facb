"""The statistics of both models on a part of a row: by the fold for finite logits, or else by that for any."""

import triton
import triton.language as tl

from e3kernels.triton.statistics import (
    LOG2_E,
    fold_finite_pair,
    fold_pair,
    is_finite,
    logits_tile,
    merge_pair,
    no_finite_pair,
    no_pair,
    no_sums,
    pair_in_nats,
    row_from,
    unit,
)
from e3kernels.triton.sweeps.span import edge_stop, edge_width, finite_tiles, lane_columns, span_of


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
