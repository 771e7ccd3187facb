"""`linear_entropy_kl`: by the shared tile loop, or, where no gradient is asked for, with the logits on chip.

The tile loop takes logits from the vendor's matrix product and overwrites them by their gradient (`entropy_kl_row`).
The kernel here multiplies and folds in one: a program takes BM tokens through a part of the vocabulary, BN columns at a
time, and no logit leaves its registers. It saves the logits' way through memory, 8 bytes a pair against 4·H floating
point operations, and pays for it with a matrix product slower than the vendor's: worth it for narrow heads.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from e3kernels.contract import DIVERGENCES, REDUCTIONS
from e3kernels.reference.linear import TileKernel, kernels
from e3kernels.reference.linear_entropy_kl import problem
from e3kernels.triton.entropy_kl import (
    Tokens,
    entropy_kl,
    entropy_kl_backward,
    prepared,
    rows_at_once,
    token_statistics,
)
from e3kernels.triton.launch import device_of, warps
from e3kernels.triton.reduction import reduced_loss
from e3kernels.triton.scalars import TEMPERATURE, scalar, student_transform, teacher_transform
from e3kernels.triton.statistics import LOWEST, PAIR_FIELDS, fold_pair, scaled_logits
from e3kernels.triton.sweeps import store_pair

TILE_LOGITS = 64 << 20  # logits of one model in a tile: 128 MiB in bf16, enough rows to fill a device's matrix units
ON_CHIP_WIDTH = 1024  # hidden sizes up to which keeping the logits on chip is expected to pay; see bench/static
NONE = REDUCTIONS.index("none")


@triton.jit
def _dot(
    hidden_ptr, weight_ptr, acc, rows, columns, k, N, V, H, hidden_stride, weight_stride,
    BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + the product of BK hidden columns from k on; UPCAST because Triton's interpreter has no bf16 products."""
    width = k + tl.arange(0, BK)
    h = tl.load(
        hidden_ptr + rows[:, None] * hidden_stride + width[None, :],
        mask=(rows[:, None] < N) & (width[None, :] < H), other=0.0,
    )  # fmt: skip
    w = tl.load(
        weight_ptr + columns[:, None].to(tl.int64) * weight_stride + width[None, :],
        mask=(columns[:, None] < V) & (width[None, :] < H), other=0.0,
    )  # fmt: skip
    if UPCAST:
        h = h.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(h, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, bias_ptr, rows, columns, N, V, H, hidden_stride, weight_stride, scale, softcap,
    HAS_BIAS: tl.constexpr, CAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of logits at T = 1, in fp32; −∞ beyond the vocabulary."""
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, H, BK):
        acc = _dot(hidden_ptr, weight_ptr, acc, rows, columns, k, N, V, H, hidden_stride, weight_stride, BK, UPCAST)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    y, _ = scaled_logits(acc, scale, softcap, CAP)
    return tl.where(columns[None, :] < V, y, float("-inf"))


@triton.jit
def linear_entropy_kl_statistics(
    student_ptr, student_weight_ptr, student_bias_ptr, teacher_ptr, teacher_weight_ptr, teacher_bias_ptr,
    labels_ptr, scalars_ptr, partial_ptr, N, V, student_width, teacher_width,
    student_stride, student_weight_stride, teacher_stride, teacher_weight_stride, split_size,
    HAS_LABELS: tl.constexpr, HAS_BIAS_S: tl.constexpr, HAS_BIAS_T: tl.constexpr, DIVERGENCE: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    inside = rows < N
    inverse_temperature = 1.0 / scalar(scalars_ptr, TEMPERATURE)
    scale_s, softcap_s = student_transform(scalars_ptr)
    scale_t, softcap_t = teacher_transform(scalars_ptr)
    label = tl.load(labels_ptr + rows, mask=inside, other=-1) if HAS_LABELS else tl.full([BM], -1, tl.int64)
    y_label = tl.zeros([BM], tl.float32)
    my = tl.full([BM], LOWEST, tl.float32)
    mt = tl.full([BM], LOWEST, tl.float32)
    gap = tl.full([BM], LOWEST, tl.float32)
    ss = tl.zeros([BM], tl.float32)
    cs = tl.zeros([BM], tl.float32)
    st = tl.zeros([BM], tl.float32)
    a = tl.zeros([BM], tl.float32)
    b = tl.zeros([BM], tl.float32)
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, V), BN):
        columns = start + tl.arange(0, BN)
        zt = _logits(
            teacher_ptr, teacher_weight_ptr, teacher_bias_ptr, rows, columns, N, V, teacher_width,
            teacher_stride, teacher_weight_stride, scale_t, softcap_t, HAS_BIAS_T, CAP_T, BM, BN, BK, UPCAST,
        )  # fmt: skip
        y = _logits(
            student_ptr, student_weight_ptr, student_bias_ptr, rows, columns, N, V, student_width,
            student_stride, student_weight_stride, scale_s, softcap_s, HAS_BIAS_S, CAP_S, BM, BN, BK, UPCAST,
        )  # fmt: skip
        if HAS_LABELS:
            y_label += tl.sum(tl.where(columns[None, :] == label[:, None], y, 0.0), axis=1)
        my, ss, cs, mt, st, a, b, gap = fold_pair(
            my, ss, cs, mt, st, a, b, gap, y, zt * inverse_temperature, inverse_temperature, DIVERGENCE, HAS_LABELS,
        )  # fmt: skip
    out = partial_ptr + (rows * tl.num_programs(1) + split) * PAIR_FIELDS
    store_pair(out, inside, my, ss, cs, y_label, mt, st, a, b, gap)


def entropy_kl_tile(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """entropy_kl's kernel for a tile of logits that nobody else needs: their gradient takes their place."""
    student, *_, need_student = arguments
    if not need_student:
        return entropy_kl(*arguments)
    d = prepared(*arguments[:8])
    tokens = rows_at_once(d, student.new_ones((), dtype=torch.float32), student)
    return tokens.losses.sum(), tokens.stats, student


_tiled, linear_entropy_kl_backward = kernels(problem, TileKernel(entropy_kl_tile, entropy_kl_backward, TILE_LOGITS))


def _matches(dtype: torch.dtype, *tensors: Tensor) -> bool:
    return all(tensor.dtype == dtype and tensor.stride(-1) == 1 for tensor in tensors)


def on_chip_tokens(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, teacher_bias: Tensor | None, labels: Tensor | None, mask: Tensor | None, *codes: Any,
) -> Tokens:  # fmt: skip
    """Per-token results with no logit in memory; forward and reverse divergence, one dtype."""
    d = prepared(student_hidden, teacher_hidden, labels, mask, *codes)
    (N, width), V, device = student_hidden.shape, student_weight.shape[0], student_hidden.device
    bm, bn, bk = (16, 32, 16) if device.type == "cpu" else (64, 128, 64)
    blocks, steps = triton.cdiv(N, bm), triton.cdiv(V, bn)
    splits = max(1, min(steps, 32, 2 * device_of(device.type, device.index).processors // blocks))
    size = triton.cdiv(steps, splits) * bn
    splits = triton.cdiv(V, size)
    partial = torch.empty(N, splits, PAIR_FIELDS.value, dtype=torch.float32, device=device)
    flags = d.flags()
    del flags["HAS_MASK"]
    wrap_triton(linear_entropy_kl_statistics)[(blocks, splits)](
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
        d.labels, d.scalars, partial, N, V, width, teacher_hidden.shape[1],
        student_hidden.stride(0), student_weight.stride(0), teacher_hidden.stride(0), teacher_weight.stride(0), size,
        HAS_BIAS_S=student_bias is not None, HAS_BIAS_T=teacher_bias is not None, BM=bm, BN=bn, BK=bk,
        UPCAST=device.type == "cpu",
        **warps(8, num_stages=3), **flags,
    )  # fmt: skip
    return token_statistics(d, partial, None, V)


def linear_entropy_kl(*arguments: Any) -> tuple[Tensor, ...]:
    """The operator's kernel: (loss, stats, gradients or empty tensors of hidden, weight, bias)."""
    *inputs, compute_dtype, reduction, num_items, need_hidden, need_weight, need_bias = arguments
    student, weight, _, teacher, teacher_weight = inputs[:5]
    divergence = inputs[10]
    narrow = max(weight.shape[1], teacher_weight.shape[1]) <= ON_CHIP_WIDTH
    gradient = (need_hidden or need_weight or need_bias) and reduction != NONE
    dtype = compute_dtype or student.dtype
    if (
        gradient
        or not narrow
        or DIVERGENCES[divergence] == "jsd"
        or not _matches(dtype, student, weight, teacher, teacher_weight)
    ):
        return _tiled(*arguments)
    tokens = on_chip_tokens(*inputs)
    empty = [student.new_empty(0, dtype=kind) for kind in (student.dtype, torch.float32, torch.float32)]
    if reduction == NONE:
        return tokens.losses, tokens.stats, *empty
    return reduced_loss(tokens.losses, tokens.stats, reduction, num_items)[0], tokens.stats, *empty
