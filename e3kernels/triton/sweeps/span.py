"""Which columns a program sweeps, tile by tile, and its accesses to them; the package says how."""

# mypy: disable-error-code="assignment"
# Tuples of tiles grow in loops that the compiler unrolls.

from typing import NamedTuple

import triton
import triton.language as tl

from e3kernels.triton.statistics import START, scaled_logits


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
def lane_columns(LANES: tl.constexpr, VEC: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def lead_of(ptr, VEC: tl.constexpr):
    """How many elements `ptr` lies behind the last multiple of VEC of them."""
    SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    return (ptr.to(tl.int64) // SIZE % VEC).to(tl.int32)


@triton.jit
def edge_width(ODD: tl.constexpr, VEC: tl.constexpr):
    """Columns of a lane in tiles with a mask: where each is an access of its own, many would fill the registers."""
    return 1 if ODD else VEC


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
    stride = tl.maximum(outer - edge, LANES * edge_width(ODD, VEC))  # a multiple that the compiler knows
    return Span(first, last, inner, outer, edge, bound, stride, lead, V + lead), together


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


@triton.jit
def label_logit(row, label, first, last):
    """The label's logit at T = 1 if its column is in [first, last), else 0."""
    inside = (label >= first) & (label < last)
    y, _ = scaled_logits(tl.load(row.ptr + label, mask=inside, other=0.0), row.transform)
    return tl.where(inside, y, 0.0)


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
