"""Online softmax statistics of one or two models over the vocabulary: what every divergence kernel is made of.

For inputs x a model's logits at T = 1 are y = cap·tanh(scale·x / cap), or scale·x without a cap. Running maxima m of y
and sums rescaled to them give, in one sweep, with u = (y − m)/T of each model,

    S_s = Σ e^{us}    C = Σ e^{ys−ms}    S_t = Σ e^{ut}    A = Σ e^{ut}·ut
    B = Σ e^{ut}(ut − us)        (forward; the reverse divergence has the models exchanged, the adaptive one has both)

so that  log Z_s = ms/T + log S_s,  log Z_s(T=1) = ms + log C,  H = log S_t − A/S_t,
         KL(p‖q) = B/S_t − log S_t + log S_s.

The maximum is taken off before the temperature divides: the difference of two quotients, of which a compiler may fuse
one with the subtraction, is as large as the rounding of the other.

Each lane keeps its own maxima and sums and no lane waits for another inside the sweep; `merge` joins lanes, splits of a
row and ranks of a vocabulary-parallel head by the same rule, always in the same order, so results are deterministic.
B is counted in units of 2^24 nats, in which no sum of finite differences overflows. `gap` is the largest yt where ys is
−∞: if the first model has mass there, the divergence is +∞. A lane that has seen nothing holds the smallest finite
maximum and zero sums, which no rescaling turns into a NaN.

What such a sweep waits for is the number of its instructions. So finite logits are folded in powers of two, f·z − f·m
in one multiply-add, with f = log₂e/T times what the model multiplies by; infinity and NaN leave sums that are not
finite, and `fold_pair`, which knows those, takes the part again.
"""

# mypy: disable-error-code="assignment"
# Tuples of tiles grow in loops that the compiler unrolls.

from typing import NamedTuple

import triton
import triton.language as tl

from e3kernels.triton.scalars import Transform

FORWARD: tl.constexpr = tl.constexpr(0)
REVERSE: tl.constexpr = tl.constexpr(1)
JSD: tl.constexpr = tl.constexpr(2)
ADAPTIVE: tl.constexpr = tl.constexpr(3)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # the smallest finite float32
UNIT: tl.constexpr = tl.constexpr(2.0**-24)  # of B, so many to a nat
NO_MASS: tl.constexpr = tl.constexpr(-745.0)  # e to it is 0 even in float64
STUDENT_FIELDS: tl.constexpr = tl.constexpr(4)  # ms, S_s, C, label logit
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# The first maximum of a lane: far below any finite logit of a model, and a power of two, whose products are exact.
START: tl.constexpr = tl.constexpr(-(2.0**100))
PAIR_FIELDS: tl.constexpr = tl.constexpr(11)  # the student's, then mt, S_t, A, and B and gap of both directions


class Student(NamedTuple):
    """ms, S_s and C of the student's logits."""

    top: tl.tensor
    total: tl.tensor
    total_1: tl.tensor


class Teacher(NamedTuple):
    """mt, S_t and A of the teacher's logits."""

    top: tl.tensor
    total: tl.tensor
    a: tl.tensor


class Cross(NamedTuple):
    """B and `gap` of one direction."""

    b: tl.tensor
    gap: tl.tensor


class Pair(NamedTuple):
    """The statistics of both models and of what each has beyond the other, empty in a direction not asked for."""

    student: Student
    teacher: Teacher
    forward: Cross
    reverse: Cross


class Finite(NamedTuple):
    """Of finite inputs z with logits in bits f·z: the largest z, base = f·top rounded once, and Σ 2^(f·z − base)."""

    top: tl.tensor
    base: tl.tensor
    total: tl.tensor


class FinitePair(NamedTuple):
    """Of both models, `hard` the student's at T = 1; a and the directions' B in bits, as if `base` were f·top."""

    student: Finite
    hard: Finite
    teacher: Finite
    a: tl.tensor
    forward: tl.tensor
    reverse: tl.tensor


class Row(NamedTuple):
    """Where a row of a model's inputs lies, and what makes them logits."""

    ptr: tl.tensor
    transform: Transform


@triton.jit
def row_from(row, lead):
    """The row with its columns counted from `lead` before its first."""
    return Row(row.ptr - lead, row.transform)


@triton.jit
def _capped(y, softcap):
    """(cap·tanh(y/cap), its derivative)."""
    e = tl.exp(-2.0 * tl.abs(y / softcap))
    tanh = (1.0 - e) / (1.0 + e)
    return tl.where(y < 0, -tanh, tanh) * softcap, 1.0 - tanh * tanh


@triton.jit
def scaled_logits(x, transform):
    """The logits at T = 1 and ∂/∂x of them."""
    y = x.to(tl.float32) * transform.scale
    slope = tl.full(y.shape, 1.0, tl.float32)
    if transform.CAP == 1:
        y, slope = _capped(y, transform.softcap)
    elif transform.CAP == 2:
        if transform.softcap > 0:
            y, slope = _capped(y, transform.softcap)
    return y, slope * transform.scale


@triton.jit
def logits_tile(row, columns, mask):
    """The logits at T = 1 of one tile of a row; −∞ outside the mask."""
    y, _ = scaled_logits(tl.load(row.ptr + columns, mask=mask, other=0.0), row.transform)
    return tl.where(mask, y, float("-inf"))


@triton.jit
def below(m, top, inverse_temperature):
    """(m − top)/T <= 0 of two maxima, finite: no 0·∞ arises where the difference overflows."""
    return tl.maximum((m - top) * inverse_temperature, LOWEST)


@triton.jit
def no_student(LANES: tl.constexpr):
    """What a lane that has seen nothing holds."""
    return Student(tl.full([LANES], LOWEST, tl.float32), tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32))


@triton.jit
def no_pair(LANES: tl.constexpr):
    """What a lane that has seen nothing holds."""
    lowest = tl.full([LANES], LOWEST, tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    cross = Cross(zero, tl.full([LANES], float("-inf"), tl.float32))
    return Pair(no_student(LANES), Teacher(lowest, zero, zero), cross, cross)


@triton.jit
def fold_student(s, ys, inverse_temperature, HAS_LABELS: tl.constexpr):
    """Take one tile (lanes, columns) of logits at T = 1 into the student's running statistics."""
    top = tl.maximum(s.top, tl.max(ys, axis=1))
    rescaled = s.total * tl.exp(below(s.top, top, inverse_temperature))
    total = rescaled + tl.sum(tl.exp((ys - top[:, None]) * inverse_temperature), axis=1)
    total_1 = s.total_1
    if HAS_LABELS:
        total_1 = total_1 * tl.exp(s.top - top) + tl.sum(tl.exp(ys - top[:, None]), axis=1)
    return Student(top, total, total_1)


@triton.jit
def fold_pair(p, ys, yt, inverse_temperature, DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr):
    """Take one tile (lanes, columns) of both models' logits at T = 1 into the running statistics."""
    s, t = p.student, p.teacher
    top_s = tl.maximum(s.top, tl.max(ys, axis=1))
    top_t = tl.maximum(t.top, tl.max(yt, axis=1))
    ds = below(s.top, top_s, inverse_temperature)
    dt = below(t.top, top_t, inverse_temperature)
    rs = tl.exp(ds)
    rt = tl.exp(dt)
    us = (ys - top_s[:, None]) * inverse_temperature
    ut = (yt - top_t[:, None]) * inverse_temperature
    es = tl.exp(us)  # of NaN still NaN, which the maxima below are not
    et = tl.exp(ut)
    us = tl.maximum(us, LOWEST)
    ut = tl.maximum(ut, LOWEST)
    forward, reverse = p.forward, p.reverse
    if DIVERGENCE == FORWARD or DIVERGENCE == ADAPTIVE:
        gap = tl.maximum(forward.gap, tl.max(tl.where(ys == float("-inf"), yt, float("-inf")), axis=1))
        b = rt * (forward.b + t.total * (dt * UNIT - ds * UNIT)) + tl.sum(et * (ut * UNIT - us * UNIT), axis=1)
        forward = Cross(b, gap)
    if DIVERGENCE == REVERSE or DIVERGENCE == ADAPTIVE:
        gap = tl.maximum(reverse.gap, tl.max(tl.where(yt == float("-inf"), ys, float("-inf")), axis=1))
        b = rs * (reverse.b + s.total * (ds * UNIT - dt * UNIT)) + tl.sum(es * (us * UNIT - ut * UNIT), axis=1)
        reverse = Cross(b, gap)
    a = rt * (t.a + t.total * tl.maximum(dt, NO_MASS)) + tl.sum(et * ut, axis=1)
    total_t = t.total * rt + tl.sum(et, axis=1)
    total_s = s.total * rs + tl.sum(es, axis=1)
    total_1 = s.total_1
    if HAS_LABELS:
        total_1 = total_1 * tl.exp(s.top - top_s) + tl.sum(tl.exp(ys - top_s[:, None]), axis=1)
    return Pair(Student(top_s, total_s, total_1), Teacher(top_t, total_t, a), forward, reverse)


@triton.jit
def unit(transform):
    """The factor from z, the inputs or what a soft cap makes of them, to logits at T = 1."""
    return transform.scale if transform.CAP == 0 else 1.0


@triton.jit
def none_finite(f, LANES: tl.constexpr):
    """What a lane that has seen nothing holds."""
    top = tl.full([LANES], START, tl.float32)
    return Finite(top, top * f, tl.zeros([LANES], tl.float32))


@triton.jit
def no_finite_pair(fs, f1, ft, LANES: tl.constexpr):
    """What a lane that has seen nothing holds."""
    zero = tl.zeros([LANES], tl.float32)
    student, hard, teacher = none_finite(fs, LANES), none_finite(f1, LANES), none_finite(ft, LANES)
    return FinitePair(student, hard, teacher, zero, zero, zero)


@triton.jit
def fold_finite(m, z, f, TILES: tl.constexpr):
    """Take the tiles (lanes, columns) of a step in: (statistics, f·z − base, 2 to it, what `base` fell by)."""
    top = m.top
    for i in tl.static_range(TILES):
        top = tl.maximum(top, tl.max(z[i], axis=1))
    base = tl.fma(top, f, 0.0)  # no plain product, which a compiler would fuse with one of its uses and not the other
    exponents, powers = (), ()
    for i in tl.static_range(TILES):
        u = tl.fma(z[i], f, -base[:, None])
        exponents += (u,)
        powers += (tl.exp2(u),)
    fall = m.base - base
    return Finite(top, base, m.total * tl.exp2(fall) + _sum(powers, TILES)), exponents, powers, fall


@triton.jit
def _sum(tiles, TILES: tl.constexpr):
    """The sum of a lane's columns: tile on tile, and then along the lane."""
    total = tiles[0]
    for i in tl.static_range(1, TILES):
        total += tiles[i]
    return tl.sum(total, axis=1)


@triton.jit
def _sum_products(e, u, TILES: tl.constexpr):
    total = e[0] * u[0]
    for i in tl.static_range(1, TILES):
        total += e[i] * u[i]
    return tl.sum(total, axis=1)


@triton.jit
def _sum_gaps(e, u, v, TILES: tl.constexpr):
    total = e[0] * (u[0] - v[0])
    for i in tl.static_range(1, TILES):
        total += e[i] * (u[i] - v[i])
    return tl.sum(total, axis=1)


@triton.jit
def fold_finite_pair(p, zs, zt, fs, f1, ft, DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, TILES: tl.constexpr):
    """Take the tiles of a step of both models into the running statistics."""
    student, us, es, ds = fold_finite(p.student, zs, fs, TILES)
    teacher, ut, et, dt = fold_finite(p.teacher, zt, ft, TILES)
    hard, forward, reverse = p.hard, p.forward, p.reverse
    if HAS_LABELS:
        hard, _, _, _ = fold_finite(p.hard, zs, f1, TILES)
    a = tl.exp2(dt) * (p.a + p.teacher.total * dt) + _sum_products(et, ut, TILES)
    if DIVERGENCE == FORWARD or DIVERGENCE == ADAPTIVE:
        forward = tl.exp2(dt) * (forward + p.teacher.total * (dt - ds)) + _sum_gaps(et, ut, us, TILES)
    if DIVERGENCE == REVERSE or DIVERGENCE == ADAPTIVE:
        reverse = tl.exp2(ds) * (reverse + p.student.total * (ds - dt)) + _sum_gaps(es, us, ut, TILES)
    return FinitePair(student, hard, teacher, a, forward, reverse)


@triton.jit
def _drift(m, f):
    """base − f·top, by which the exponents of `m` are off."""
    return -tl.fma(m.top, f, -m.base)


@triton.jit
def _total(m, f):
    """Σ 2^(f·z − f·top), in which the largest z counts as 1 exactly."""
    drift = _drift(m, f)
    return 1.0 + (m.total - tl.exp2(-drift)) * tl.exp2(drift)


@triton.jit
def in_nats(m, hard, f, f1, unit):
    """The student's statistics of a lane."""
    return Student(m.top * unit, _total(m, f), _total(hard, f1))


@triton.jit
def pair_in_nats(p, fs, f1, ft, unit_s, unit_t):
    """The statistics of a lane."""
    ds = _drift(p.student, fs)
    dt = _drift(p.teacher, ft)
    none = tl.full(ds.shape, float("-inf"), tl.float32)
    a = tl.exp2(dt) * (p.a + p.teacher.total * dt) * LN_2
    forward = tl.exp2(dt) * (p.forward + p.teacher.total * (dt - ds)) * (LN_2 * UNIT)
    reverse = tl.exp2(ds) * (p.reverse + p.student.total * (ds - dt)) * (LN_2 * UNIT)
    student = in_nats(p.student, p.hard, fs, f1, unit_s)
    teacher = Teacher(p.teacher.top * unit_t, _total(p.teacher, ft), a)
    return Pair(student, teacher, Cross(forward, none), Cross(reverse, none))


@triton.jit
def no_sums():
    """The joined statistics of nothing."""
    zero = tl.full([], 0.0, tl.float32)
    cross = Cross(zero, tl.full([], float("-inf"), tl.float32))
    return Pair(Student(zero, zero, zero), Teacher(zero, zero, zero), cross, cross)


@triton.jit
def is_finite(pair):
    """Whether sums over a part of the row are those of finite logits alone."""
    value = pair.student.total + pair.teacher.total + pair.student.total_1
    value += pair.teacher.a + pair.forward.b + pair.reverse.b
    return (pair.student.total > 0) & (pair.teacher.total > 0) & (tl.abs(value) < float("inf"))


@triton.jit
def merge_student(s, inverse_temperature, AXIS: tl.constexpr):
    """Join the student's statistics along AXIS."""
    top = tl.max(s.top, axis=AXIS)
    ds = below(s.top, tl.expand_dims(top, AXIS), inverse_temperature)
    total_1 = tl.sum(s.total_1 * tl.exp(s.top - tl.expand_dims(top, AXIS)), axis=AXIS)
    return Student(top, tl.sum(s.total * tl.exp(ds), axis=AXIS), total_1)


@triton.jit
def merge_pair(p, inverse_temperature, DIVERGENCE: tl.constexpr, AXIS: tl.constexpr):
    """Join the statistics of both models along AXIS."""
    s, t = p.student, p.teacher
    student = merge_student(s, inverse_temperature, AXIS)
    top_t = tl.max(t.top, axis=AXIS)
    ds = below(s.top, tl.expand_dims(student.top, AXIS), inverse_temperature)
    dt = below(t.top, tl.expand_dims(top_t, AXIS), inverse_temperature)
    rt = tl.exp(dt)
    b_forward, b_reverse = p.forward.b, p.reverse.b
    if DIVERGENCE == FORWARD or DIVERGENCE == ADAPTIVE:
        b_forward = rt * (b_forward + t.total * (dt * UNIT - ds * UNIT))
    if DIVERGENCE == REVERSE or DIVERGENCE == ADAPTIVE:
        b_reverse = tl.exp(ds) * (b_reverse + s.total * (ds * UNIT - dt * UNIT))
    a = tl.sum(rt * (t.a + t.total * tl.maximum(dt, NO_MASS)), axis=AXIS)
    teacher = Teacher(top_t, tl.sum(t.total * rt, axis=AXIS), a)
    forward = Cross(tl.sum(b_forward, axis=AXIS), tl.max(p.forward.gap, axis=AXIS))
    reverse = Cross(tl.sum(b_reverse, axis=AXIS), tl.max(p.reverse.gap, axis=AXIS))
    return Pair(student, teacher, forward, reverse)


@triton.jit
def load_student(p, mask):
    """(statistics, the label's logit) at `p`; where the mask is false, those of nothing."""
    top = tl.load(p, mask=mask, other=LOWEST)
    total = tl.load(p + 1, mask=mask, other=0.0)
    total_1 = tl.load(p + 2, mask=mask, other=0.0)
    return Student(top, total, total_1), tl.load(p + 3, mask=mask, other=0.0)


@triton.jit
def store_student(p, mask, s, y_label):
    tl.store(p, s.top, mask=mask)
    tl.store(p + 1, s.total, mask=mask)
    tl.store(p + 2, s.total_1, mask=mask)
    tl.store(p + 3, y_label, mask=mask)


@triton.jit
def load_pair(p, mask):
    """(statistics, the label's logit) at `p`; where the mask is false, those of nothing."""
    student, y_label = load_student(p, mask)
    top = tl.load(p + 4, mask=mask, other=LOWEST)
    total = tl.load(p + 5, mask=mask, other=0.0)
    a = tl.load(p + 6, mask=mask, other=0.0)
    forward = Cross(tl.load(p + 7, mask=mask, other=0.0), tl.load(p + 8, mask=mask, other=float("-inf")))
    reverse = Cross(tl.load(p + 9, mask=mask, other=0.0), tl.load(p + 10, mask=mask, other=float("-inf")))
    return Pair(student, Teacher(top, total, a), forward, reverse), y_label


@triton.jit
def store_pair(p, mask, pair, y_label):
    store_student(p, mask, pair.student, y_label)
    tl.store(p + 4, pair.teacher.top, mask=mask)
    tl.store(p + 5, pair.teacher.total, mask=mask)
    tl.store(p + 6, pair.teacher.a, mask=mask)
    tl.store(p + 7, pair.forward.b, mask=mask)
    tl.store(p + 8, pair.forward.gap, mask=mask)
    tl.store(p + 9, pair.reverse.b, mask=mask)
    tl.store(p + 10, pair.reverse.gap, mask=mask)
