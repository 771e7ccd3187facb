"""Online softmax statistics of one or two models over the vocabulary: what every divergence kernel is made of.

For inputs x a model's logits at T = 1 are y = cap·tanh(scale·x / cap), or scale·x without a cap. Running maxima m of y
and sums rescaled to them give, in one sweep, with u = (y − m)/T of each model,

    S_s = Σ e^{us}    C = Σ e^{ys−ms}    S_t = Σ e^{ut}    A = Σ e^{ut}·ut
    B = Σ e^{ut}(ut − us)        (forward; the reverse divergence has the models exchanged)

so that  log Z_s = ms/T + log S_s,  log Z_s(T=1) = ms + log C,  H = log S_t − A/S_t,
         KL(p‖q) = B/S_t − log S_t + log S_s.

The maximum is taken off before the temperature divides: the difference of two quotients, of which a compiler may fuse
one with the subtraction, is as large as the rounding of the other.

Each lane keeps its own maxima and sums and no lane waits for another inside the sweep; `merge` joins lanes, splits of a
row and ranks of a vocabulary-parallel head by the same rule, always in the same order, so results are deterministic.
B is counted in units of 2^24 nats, in which no sum of finite differences overflows. `gap` is the largest yt where ys is
−∞: if the first model has mass there, the divergence is +∞. A lane that has seen nothing holds the smallest finite
maximum and zero sums, which no rescaling turns into a NaN.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from e3kernels.triton.scalars import Transform

FORWARD: tl.constexpr = tl.constexpr(0)
REVERSE: tl.constexpr = tl.constexpr(1)
JSD: tl.constexpr = tl.constexpr(2)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # the smallest finite float32
UNIT: tl.constexpr = tl.constexpr(2.0**-24)  # of B, so many to a nat
NO_MASS: tl.constexpr = tl.constexpr(-745.0)  # e to it is 0 even in float64
STUDENT_FIELDS: tl.constexpr = tl.constexpr(4)  # ms, S_s, C, label logit
PAIR_FIELDS: tl.constexpr = tl.constexpr(9)  # the student's, then mt, S_t, A, B, gap


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


class Pair(NamedTuple):
    """The statistics of both models, B and `gap`."""

    student: Student
    teacher: Teacher
    b: tl.tensor
    gap: tl.tensor


class Row(NamedTuple):
    """Where a row of a model's inputs lies, and what makes them logits."""

    ptr: tl.tensor
    transform: Transform


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
    return Pair(no_student(LANES), Teacher(lowest, zero, zero), zero, tl.full([LANES], float("-inf"), tl.float32))


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
    b, gap = p.b, p.gap
    if DIVERGENCE == FORWARD:
        gap = tl.maximum(gap, tl.max(tl.where(ys == float("-inf"), yt, float("-inf")), axis=1))
        b = rt * (b + t.total * (dt * UNIT - ds * UNIT)) + tl.sum(et * (ut * UNIT - us * UNIT), axis=1)
    elif DIVERGENCE == REVERSE:
        gap = tl.maximum(gap, tl.max(tl.where(yt == float("-inf"), ys, float("-inf")), axis=1))
        b = rs * (b + s.total * (ds * UNIT - dt * UNIT)) + tl.sum(es * (us * UNIT - ut * UNIT), axis=1)
    a = rt * (t.a + t.total * tl.maximum(dt, NO_MASS)) + tl.sum(et * ut, axis=1)
    total_t = t.total * rt + tl.sum(et, axis=1)
    total_s = s.total * rs + tl.sum(es, axis=1)
    total_1 = s.total_1
    if HAS_LABELS:
        total_1 = total_1 * tl.exp(s.top - top_s) + tl.sum(tl.exp(ys - top_s[:, None]), axis=1)
    return Pair(Student(top_s, total_s, total_1), Teacher(top_t, total_t, a), b, gap)


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
    if DIVERGENCE == REVERSE:
        b = tl.exp(ds) * (p.b + s.total * (ds * UNIT - dt * UNIT))
    else:
        b = rt * (p.b + t.total * (dt * UNIT - ds * UNIT))
    a = tl.sum(rt * (t.a + t.total * tl.maximum(dt, NO_MASS)), axis=AXIS)
    teacher = Teacher(top_t, tl.sum(t.total * rt, axis=AXIS), a)
    return Pair(student, teacher, tl.sum(b, axis=AXIS), tl.max(p.gap, axis=AXIS))


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
    b = tl.load(p + 7, mask=mask, other=0.0)
    gap = tl.load(p + 8, mask=mask, other=float("-inf"))
    return Pair(student, Teacher(top, total, a), b, gap), y_label


@triton.jit
def store_pair(p, mask, pair, y_label):
    store_student(p, mask, pair.student, y_label)
    tl.store(p + 4, pair.teacher.top, mask=mask)
    tl.store(p + 5, pair.teacher.total, mask=mask)
    tl.store(p + 6, pair.teacher.a, mask=mask)
    tl.store(p + 7, pair.b, mask=mask)
    tl.store(p + 8, pair.gap, mask=mask)
