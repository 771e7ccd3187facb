"""gumbel_topk as Triton kernels: one program per row, everything in fp64, the reference's bits in noise and mask.

Scores s = θ + κ·g. The k-th largest is found by building its bits from the highest down, each by one count of the
scores not below; ties go to the lower index. `threshold` solves Σσ(x − d) = k by Newton steps kept inside a bracket.
These kernels are compiled without fused multiply-adds: the logarithm of the noise is one fixed IEEE sequence.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3kernels.compat import wrap_triton
from e3kernels.contract import RELAXATIONS
from e3kernels.triton.launch import launch
from e3kernels.triton.scalars import on_device

THRESHOLD: tl.constexpr = tl.constexpr(RELAXATIONS.index("threshold"))
SOFTMAX: tl.constexpr = tl.constexpr(RELAXATIONS.index("softmax"))
SOLVER_STEPS: tl.constexpr = tl.constexpr(24)
INFINITE: tl.constexpr = tl.constexpr(1000.0)  # an infinite score counts as this many τ beyond the farthest finite one
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
SQRT2: tl.constexpr = tl.constexpr(1.4142135623730951)
SERIES: tl.constexpr = tl.constexpr(10)  # terms 1/21, 1/19, …, 1/3 of artanh


@triton.jit
def fixed_log(x):
    """log x of positive normal fp64 numbers: log m = 2·artanh((m−1)/(m+1)) with m in [√½, √2)."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits >> 52) - 1023
    m = ((bits & ((1 << 52) - 1)) | (1023 << 52)).to(tl.float64, bitcast=True)
    above = m >= SQRT2
    m = tl.where(above, m * 0.5, m)
    e = tl.where(above, exponent + 1, exponent).to(tl.float64)
    f = (m - 1.0) / (m + 1.0)
    square = f * f
    series = tl.full(f.shape, 1.0 / (2 * SERIES + 1), tl.float64)
    for n in tl.static_range(SERIES - 1):
        series = series * square + 1.0 / (2 * (SERIES - 1 - n) + 1)
    return e * LN2 + (f * 2.0) * (series * square + 1.0)


@triton.jit
def gumbel_noise(seed, step, row, columns):
    """g = −log(−log u), u = (x>>8 + ½)·2⁻²⁴ with x from Philox4x32-10: counter (step, row, column // 4)."""
    low = tl.full(columns.shape, 0, tl.uint32) + (step & 0xFFFFFFFF).to(tl.uint32)
    high = tl.full(columns.shape, 0, tl.uint32) + ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    rows = tl.full(columns.shape, 0, tl.uint32) + row.to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, rows, (columns // 4).to(tl.uint32))
    word = columns % 4
    x = tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))
    u = ((x >> 8).to(tl.float64) + 0.5) * 5.9604644775390625e-08
    return -fixed_log(-fixed_log(u))


@triton.jit
def _scores(logits_ptr, scalars_ptr, seed, step, row, L, columns, inside):
    theta = tl.load(logits_ptr + row * L + columns, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    scale = tl.load(scalars_ptr + 1)
    noise = gumbel_noise(tl.cast(seed, tl.int64), tl.cast(step, tl.int64), row, columns)
    return tl.where(scale == 0.0, theta, theta + noise * scale)


@triton.jit
def _largest(s, inside, columns, k):
    """Ones at the k largest scores, the lower index first among equal ones."""
    bits = tl.where(s == 0.0, 0.0, s).to(tl.int64, bitcast=True)
    ordered = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)  # integers that compare as the scores do
    kth = tl.full([1], -0x7FFFFFFFFFFFFFFF - 1, tl.int64)
    for n in range(64):
        # Adding 2^(63−n) to the lowest integer sets that bit of its unsigned order.
        candidate = kth + (tl.full([1], 1, tl.int64) << (63 - n))
        count = tl.sum((inside & (ordered >= candidate)).to(tl.int32), axis=0)
        kth = tl.where(count >= k, candidate, kth)
    above = inside & (ordered > kth)
    equal = inside & (ordered == kth)
    missing = k - tl.sum(above.to(tl.int32), axis=0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= missing))


@triton.jit
def _finite(s, inside, tau):
    """Infinite scores moved to INFINITE·τ beyond the farthest finite one."""
    finite = inside & (tl.abs(s) < float("inf"))
    any_finite = tl.max(finite.to(tl.int32), axis=0) > 0
    top = tl.where(any_finite, tl.max(tl.where(finite, s, float("-inf")), axis=0), 0.0)
    bottom = tl.where(any_finite, tl.min(tl.where(finite, s, float("inf")), axis=0), 0.0)
    s = tl.where(s == float("inf"), top + INFINITE * tau, s)
    return tl.where(s == float("-inf"), bottom - INFINITE * tau, s)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _threshold(s, kept, inside, k, L, tau):
    """σ(x − d) with Σσ(x − d) = k; x in units of τ around the middle of the k-th and (k+1)-th largest score."""
    kth = tl.min(tl.where(kept, s, float("inf")), axis=0)
    below = tl.max(tl.where(inside & (kept == 0), s, float("-inf")), axis=0)
    x = (s - (kth / 2 + below / 2)) / tau
    d = tl.zeros([1], tl.float64)
    low = -tl.log(d + 2.0 * k)
    high = tl.log(d + 2.0 * (L - k))
    for _ in range(SOLVER_STEPS):
        p = tl.where(inside, _sigmoid(x - d), 0.0)
        excess = tl.sum(p, axis=0) - k
        low = tl.where(excess > 0, d, low)
        high = tl.where(excess > 0, high, d)
        newton = d + excess / tl.sum(p * (1.0 - p), axis=0)
        d = tl.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
    return _sigmoid(x - d)


@triton.jit
def _softmax(s, inside, tau):
    x = tl.where(inside, s / tau, float("-inf"))
    e = tl.exp(x - tl.max(x, axis=0))
    return e / tl.sum(e, axis=0)


@triton.jit
def _exhausted(s, a):
    """The scores that the next of the successive softmaxes sees: s + log(1 − a), −∞ for a certain choice."""
    return s + tl.log(1.0 - a)


@triton.jit(do_not_specialize=["k", "seed", "step"])
def gumbel_topk_sample(
    logits_ptr, scalars_ptr, mask_ptr, probs_ptr, L, k, seed: tl.int64, step: tl.int64,
    RELAXATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < L
    tau = tl.load(scalars_ptr)
    s = _scores(logits_ptr, scalars_ptr, seed, step, row, L, columns, inside)
    kept = _largest(s, inside, columns, k)
    undefined = tl.max((inside & (s != s)).to(tl.int32), axis=0) > 0
    mask = tl.where(undefined, float("nan"), kept.to(tl.float64))
    s = _finite(s, inside, tau)
    if RELAXATION == THRESHOLD:
        p = _threshold(s, kept, inside, k, L, tau)
    elif RELAXATION == SOFTMAX:
        p = k * _softmax(s, inside, tau)
    else:
        p = tl.zeros([BLOCK], tl.float64)
        for _ in range(k):
            a = _softmax(s, inside, tau)
            p += a
            s = _exhausted(s, a)
    constant = (k == 0) | (k == L)
    p = tl.where(undefined, float("nan"), tl.where(constant, mask, p))
    out = row * L + columns
    tl.store(mask_ptr + out, mask.to(tl.float32).to(mask_ptr.dtype.element_ty), mask=inside)
    tl.store(probs_ptr + out, p.to(tl.float32).to(probs_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_gradient(a, g):
    return a * (g - tl.sum(a * g, axis=0))


@triton.jit(do_not_specialize=["k", "seed", "step"])
def gumbel_topk_gradient(
    grad_ptr, logits_ptr, probs_ptr, scalars_ptr, steps_ptr, out_ptr, L, k, seed: tl.int64, step: tl.int64,
    RELAXATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of `probs`; steps_ptr holds the successive softmaxes of the row, (k, L)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < L
    at = row * L + columns
    tau = tl.load(scalars_ptr)
    g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    p = tl.load(probs_ptr + at, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    if RELAXATION == THRESHOLD:
        a = p * (1.0 - p)
        total = tl.sum(a, axis=0)
        out = a * (g - tl.sum(a * g, axis=0) / tl.where(total == 0.0, 1.0, total)) / tau
    elif RELAXATION == SOFTMAX:
        out = k * _softmax_gradient(p / k, g) / tau
    else:
        s = _finite(_scores(logits_ptr, scalars_ptr, seed, step, row, L, columns, inside), inside, tau)
        steps = steps_ptr + row * k * L + columns
        for j in range(k):
            a = _softmax(s, inside, tau)
            tl.store(steps + j * L, a, mask=inside)
            s = _exhausted(s, a)
        out = tl.zeros([BLOCK], tl.float64)
        for j in range(k):
            # `out` is the gradient with respect to the scores after this step on entry, before it on exit.
            a = tl.load(steps + (k - 1 - j) * L, mask=inside, other=0.0)
            rest = 1.0 - a
            through = tl.where(rest > 0.0, out / rest, 0.0)
            out += _softmax_gradient(a, g - through) / tau
    out = tl.where((k == 0) | (k == L), 0.0, out)
    tl.store(out_ptr + at, out.to(tl.float32).to(out_ptr.dtype.element_ty), mask=inside)


def _launch(L: int) -> dict[str, Any]:
    block = triton.next_power_of_2(L)
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256)), "enable_fp_fusion": False}


def gumbel_topk(
    logits: Tensor, scalars: Tensor, k: int, seed: int, step: int, relaxation: int
) -> tuple[Tensor, Tensor]:
    """The operator's kernel: (mask, probs)."""
    L = logits.shape[-1]
    rows = logits.contiguous()
    mask, probs = torch.empty_like(rows), torch.empty_like(rows)
    launch(
        wrap_triton(gumbel_topk_sample),
        (rows.numel() // L,),
        rows,
        on_device(scalars, logits.device),
        mask,
        probs,
        L,
        k,
        seed,
        step,
        RELAXATION=relaxation,
        **_launch(L),
    )
    return mask, probs


def gumbel_topk_backward(
    grad: Tensor, logits: Tensor, probs: Tensor, scalars: Tensor, k: int, seed: int, step: int, relaxation: int
) -> Tensor:
    """The gradient of `probs` with respect to the logits."""
    L = logits.shape[-1]
    rows = logits.contiguous()
    successive = relaxation == RELAXATIONS.index("successive")
    steps = torch.empty((rows.numel() if successive else 0) * k, dtype=torch.float64, device=logits.device)
    out = torch.empty_like(rows)
    launch(wrap_triton(gumbel_topk_gradient), (rows.numel() // L,),
        grad.contiguous(), rows, probs.contiguous(), on_device(scalars, logits.device), steps, out, L, k, seed, step,
        RELAXATION=relaxation, **_launch(L),
    )  # fmt: skip
    return out
