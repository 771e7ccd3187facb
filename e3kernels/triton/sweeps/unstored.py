"""The student's statistics of the ids that a stored teacher does not hold."""

# mypy: disable-error-code="assignment"
# Tuples of tiles grow in loops that the compiler unrolls.

import triton
import triton.language as tl

from e3kernels.triton.statistics import (
    LOG2_E,
    fold_finite,
    fold_student,
    in_nats,
    logits_tile,
    merge_student,
    no_student,
    none_finite,
    row_from,
    unit,
)
from e3kernels.triton.sweeps.span import (
    edge_stop,
    edge_width,
    finite_tiles,
    lane_columns,
    packed,
    span_of,
    step_columns,
)


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
