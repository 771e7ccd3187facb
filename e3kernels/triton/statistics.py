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

import triton
import triton.language as tl

FORWARD: tl.constexpr = tl.constexpr(0)
REVERSE: tl.constexpr = tl.constexpr(1)
JSD: tl.constexpr = tl.constexpr(2)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # the smallest finite float32
UNIT: tl.constexpr = tl.constexpr(2.0**-24)  # of B, so many to a nat
NO_MASS: tl.constexpr = tl.constexpr(-745.0)  # e to it is 0 even in float64
STUDENT_FIELDS: tl.constexpr = tl.constexpr(4)  # ms, S_s, C, label logit
PAIR_FIELDS: tl.constexpr = tl.constexpr(9)  # the student's, then mt, S_t, A, B, gap


@triton.jit
def _capped(y, softcap):
    """(cap·tanh(y/cap), its derivative)."""
    e = tl.exp(-2.0 * tl.abs(y / softcap))
    tanh = (1.0 - e) / (1.0 + e)
    return tl.where(y < 0, -tanh, tanh) * softcap, 1.0 - tanh * tanh


@triton.jit
def scaled_logits(x, scale, softcap, CAP: tl.constexpr):
    """The logits at T = 1 and ∂/∂x of them. CAP: 0 no soft cap, 1 a soft cap, 2 decided by softcap > 0 at run time."""
    y = x.to(tl.float32) * scale
    slope = tl.full(y.shape, 1.0, tl.float32)
    if CAP == 1:
        y, slope = _capped(y, softcap)
    elif CAP == 2:
        if softcap > 0:
            y, slope = _capped(y, softcap)
    return y, slope * scale


@triton.jit
def logits_tile(row_ptr, columns, mask, scale, softcap, CAP: tl.constexpr):
    """The logits at T = 1 of one tile of a row; −∞ outside the mask."""
    y, _ = scaled_logits(tl.load(row_ptr + columns, mask=mask, other=0.0), scale, softcap, CAP)
    return tl.where(mask, y, float("-inf"))


@triton.jit
def below(m, top, inverse_temperature):
    """(m − top)/T <= 0 of two maxima, finite: no 0·∞ arises where the difference overflows."""
    return tl.maximum((m - top) * inverse_temperature, LOWEST)


@triton.jit
def fold_student(my, ss, cs, ys, inverse_temperature, HAS_LABELS: tl.constexpr):
    """Take one tile (lanes, columns) of logits at T = 1 into the student's running statistics."""
    my_new = tl.maximum(my, tl.max(ys, axis=1))
    rs = tl.exp(below(my, my_new, inverse_temperature))
    ss = ss * rs + tl.sum(tl.exp((ys - my_new[:, None]) * inverse_temperature), axis=1)
    if HAS_LABELS:
        cs = cs * tl.exp(my - my_new) + tl.sum(tl.exp(ys - my_new[:, None]), axis=1)
    return my_new, ss, cs


@triton.jit
def fold_pair(
    my, ss, cs, mt, st, a, b, gap, ys, yt, inverse_temperature, DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr
):
    """Take one tile (lanes, columns) of both models' logits at T = 1 into the running statistics."""
    my_new = tl.maximum(my, tl.max(ys, axis=1))
    mt_new = tl.maximum(mt, tl.max(yt, axis=1))
    ds = below(my, my_new, inverse_temperature)
    dt = below(mt, mt_new, inverse_temperature)
    rs = tl.exp(ds)
    rt = tl.exp(dt)
    us = (ys - my_new[:, None]) * inverse_temperature
    ut = (yt - mt_new[:, None]) * inverse_temperature
    es = tl.exp(us)  # of NaN still NaN, which the maxima below are not
    et = tl.exp(ut)
    us = tl.maximum(us, LOWEST)
    ut = tl.maximum(ut, LOWEST)
    if DIVERGENCE == FORWARD:
        gap = tl.maximum(gap, tl.max(tl.where(ys == float("-inf"), yt, float("-inf")), axis=1))
        b = rt * (b + st * (dt * UNIT - ds * UNIT)) + tl.sum(et * (ut * UNIT - us * UNIT), axis=1)
    elif DIVERGENCE == REVERSE:
        gap = tl.maximum(gap, tl.max(tl.where(yt == float("-inf"), ys, float("-inf")), axis=1))
        b = rs * (b + ss * (ds * UNIT - dt * UNIT)) + tl.sum(es * (us * UNIT - ut * UNIT), axis=1)
    a = rt * (a + st * tl.maximum(dt, NO_MASS)) + tl.sum(et * ut, axis=1)
    st = st * rt + tl.sum(et, axis=1)
    ss = ss * rs + tl.sum(es, axis=1)
    if HAS_LABELS:
        cs = cs * tl.exp(my - my_new) + tl.sum(tl.exp(ys - my_new[:, None]), axis=1)
    return my_new, ss, cs, mt_new, st, a, b, gap


@triton.jit
def merge_student(my, ss, cs, inverse_temperature, AXIS: tl.constexpr):
    """Join the student's statistics along AXIS."""
    m = tl.max(my, axis=AXIS)
    ds = below(my, tl.expand_dims(m, AXIS), inverse_temperature)
    c = tl.sum(cs * tl.exp(my - tl.expand_dims(m, AXIS)), axis=AXIS)
    return m, tl.sum(ss * tl.exp(ds), axis=AXIS), c


@triton.jit
def merge_pair(my, ss, cs, mt, st, a, b, gap, inverse_temperature, DIVERGENCE: tl.constexpr, AXIS: tl.constexpr):
    """Join the statistics of both models along AXIS."""
    m, s, c = merge_student(my, ss, cs, inverse_temperature, AXIS)
    mt_new = tl.max(mt, axis=AXIS)
    ds = below(my, tl.expand_dims(m, AXIS), inverse_temperature)
    dt = below(mt, tl.expand_dims(mt_new, AXIS), inverse_temperature)
    rt = tl.exp(dt)
    if DIVERGENCE == REVERSE:
        b = tl.exp(ds) * (b + ss * (ds * UNIT - dt * UNIT))
    else:
        b = rt * (b + st * (dt * UNIT - ds * UNIT))
    a = tl.sum(rt * (a + st * tl.maximum(dt, NO_MASS)), axis=AXIS)
    return m, s, c, mt_new, tl.sum(st * rt, axis=AXIS), a, tl.sum(b, axis=AXIS), tl.max(gap, axis=AXIS)
