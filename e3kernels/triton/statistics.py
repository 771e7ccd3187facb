"""Online softmax statistics of one or two models over the vocabulary: what every divergence kernel is made of.

For logits x a model's tempered logits are z = cap·tanh(scale·x / cap)/T (z = scale·x/T without a cap). Running maxima m
and sums rescaled to them give, in one sweep,

    S_s = Σ e^{zs−ms}    C = Σ e^{(zs−ms)·T}    S_t = Σ e^{zt−mt}    A = Σ e^{zt−mt}(zt−mt)
    B = Σ e^{zt−mt}((zt−mt) − (zs−ms))        (forward; the reverse divergence has the models exchanged)

so that  log Z_s = ms + log S_s,  log Z_s(T=1) = T·ms + log C,  H = log S_t − A/S_t,
         KL(p‖q) = B/S_t − log S_t + log S_s.

Each lane keeps its own maxima and sums and no lane waits for another inside the sweep; `merge` joins lanes, splits of a
row and ranks of a vocabulary-parallel head by the same rule, always in the same order, so results are deterministic.
`gap` is max(zt − zs): +∞ exactly where the second model has no mass under the first, which makes the divergence +∞.
A lane that has seen nothing holds the smallest finite maximum and zero sums, which no rescaling turns into a NaN.
"""

import triton
import triton.language as tl

FORWARD: tl.constexpr = tl.constexpr(0)
REVERSE: tl.constexpr = tl.constexpr(1)
JSD: tl.constexpr = tl.constexpr(2)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # the smallest finite float32
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
def tempered_tile(row_ptr, columns, mask, scale, softcap, temperature, CAP: tl.constexpr):
    """z of one tile of a row; −∞ outside the mask."""
    x = tl.load(row_ptr + columns, mask=mask, other=0.0)
    y, _ = scaled_logits(x, scale, softcap, CAP)
    return tl.where(mask, y * (1.0 / temperature), float("-inf"))


@triton.jit
def fold_student(ms, ss, cs, zs, temperature, HAS_LABELS: tl.constexpr):
    """Take one tile (lanes, columns) into the student's running statistics."""
    ms_new = tl.maximum(ms, tl.max(zs, axis=1))
    ds = ms - ms_new
    es = zs - ms_new[:, None]
    ss = ss * tl.exp(ds) + tl.sum(tl.exp(es), axis=1)
    if HAS_LABELS:
        cs = cs * tl.exp(ds * temperature) + tl.sum(tl.exp(es * temperature), axis=1)
    return ms_new, ss, cs


@triton.jit
def fold_pair(ms, ss, cs, mt, st, a, b, gap, zs, zt, temperature, DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr):
    """Take one tile (lanes, columns) of both models into the running statistics."""
    ms_new = tl.maximum(ms, tl.max(zs, axis=1))
    mt_new = tl.maximum(mt, tl.max(zt, axis=1))
    ds = ms - ms_new
    dt = mt - mt_new
    rs = tl.exp(ds)
    rt = tl.exp(dt)
    us = zs - ms_new[:, None]
    ut = tl.maximum(zt - mt_new[:, None], LOWEST)
    es = tl.exp(us)
    et = tl.exp(ut)
    if DIVERGENCE != JSD:
        # 0·∞ never arises: an infinite difference is cut to the largest finite one and kept in `gap`.
        if DIVERGENCE == FORWARD:
            raw = zt - zs
        else:
            raw = zs - zt
        gap = tl.maximum(gap, tl.max(raw, axis=1))
        d = tl.minimum(tl.maximum(raw, LOWEST), -LOWEST)
        if DIVERGENCE == FORWARD:
            b = rt * (b + st * (dt - ds)) + tl.sum(et * (d - (mt_new - ms_new)[:, None]), axis=1)
        else:
            b = rs * (b + ss * (ds - dt)) + tl.sum(es * (d - (ms_new - mt_new)[:, None]), axis=1)
    a = rt * (a + st * dt) + tl.sum(et * ut, axis=1)
    st = st * rt + tl.sum(et, axis=1)
    ss = ss * rs + tl.sum(es, axis=1)
    if HAS_LABELS:
        cs = cs * tl.exp(ds * temperature) + tl.sum(tl.exp(us * temperature), axis=1)
    return ms_new, ss, cs, mt_new, st, a, b, gap


@triton.jit
def merge_student(ms, ss, cs, temperature, AXIS: tl.constexpr):
    """Join the student's statistics along AXIS."""
    m = tl.max(ms, axis=AXIS)
    d = ms - tl.expand_dims(m, AXIS)
    return m, tl.sum(ss * tl.exp(d), axis=AXIS), tl.sum(cs * tl.exp(d * temperature), axis=AXIS)


@triton.jit
def merge_pair(ms, ss, cs, mt, st, a, b, gap, temperature, DIVERGENCE: tl.constexpr, AXIS: tl.constexpr):
    """Join the statistics of both models along AXIS."""
    m, s, c = merge_student(ms, ss, cs, temperature, AXIS)
    mt_new = tl.max(mt, axis=AXIS)
    ds = ms - tl.expand_dims(m, AXIS)
    dt = mt - tl.expand_dims(mt_new, AXIS)
    rt = tl.exp(dt)
    if DIVERGENCE == REVERSE:
        b = tl.exp(ds) * (b + ss * (ds - dt))
    else:
        b = rt * (b + st * (dt - ds))
    a = rt * (a + st * dt)
    return (
        m,
        s,
        c,
        mt_new,
        tl.sum(st * rt, axis=AXIS),
        tl.sum(a, axis=AXIS),
        tl.sum(b, axis=AXIS),
        tl.max(gap, axis=AXIS),
    )
