"""`linear_topk_kl`: by the shared tile loop, or, where no gradient is asked for, with the logits on chip."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3kernels.compat import wrap_triton
from e3kernels.contract import REDUCTIONS
from e3kernels.tiled.linear import TileKernel, kernels
from e3kernels.tiled.linear_topk_kl import linear_loss
from e3kernels.triton.launch import contiguous, launch
from e3kernels.triton.on_chip import ADDED_ROWS, TILE_LOGITS, projected_tile, suits_chip, tiling
from e3kernels.triton.reduction import without_gradients
from e3kernels.triton.scalars import TEMPERATURE, scalar, student_transform
from e3kernels.triton.statistics import STUDENT_FIELDS, fold_student, no_student, store_student
from e3kernels.triton.topk_kl import SparseTokens, prepared, token_statistics, topk_kl, topk_kl_backward

NONE = REDUCTIONS.index("none")
_tiled, linear_topk_kl_backward = kernels(
    linear_loss, TileKernel(topk_kl, topk_kl_backward, TILE_LOGITS, added_rows=ADDED_ROWS)
)


@triton.jit
def linear_topk_kl_statistics(
    hidden_ptr, weight_ptr, bias_ptr, teacher_ptr, ids_ptr, labels_ptr, scalars_ptr, partial_ptr, gathered_ptr,
    N, V, width, k, hidden_stride, weight_stride, split_size,
    HAS_LABELS: tl.constexpr, HAS_BIAS: tl.constexpr, CAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The statistics of the ids not stored, and the stored ids' logits at T = 1, each written by the tile it is in."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    inside = rows < N
    inverse_temperature = 1.0 / scalar(scalars_ptr, TEMPERATURE)
    transform = student_transform(scalars_ptr, CAP)
    label = tl.load(labels_ptr + rows, mask=inside, other=-1) if HAS_LABELS else tl.full([BM], -1, tl.int64)
    y_label = tl.zeros([BM], tl.float32)
    statistics = no_student(BM)
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, V), BN):
        columns = start + tl.arange(0, BN)
        y = projected_tile(
            hidden_ptr, weight_ptr, bias_ptr, rows, columns, N, V, width, hidden_stride, weight_stride,
            transform, HAS_BIAS, BM, BN, BK, UPCAST,
        )  # fmt: skip
        if HAS_LABELS:
            y_label += tl.sum(tl.where(columns[None, :] == label[:, None], y, 0.0), axis=1)
        rest = y
        for i in range(k):
            log_p = tl.load(teacher_ptr + rows * k + i, mask=inside, other=float("-inf"))
            ids = tl.load(ids_ptr + rows * k + i, mask=inside, other=-1)
            ids = tl.where(log_p == float("-inf"), -1, ids)
            hit = columns[None, :] == ids[:, None]
            here = (ids >= start) & (ids < start + BN)
            tl.store(gathered_ptr + rows * k + i, tl.sum(tl.where(hit, y, 0.0), axis=1), mask=here)
            rest = tl.where(hit, float("-inf"), rest)
        statistics = fold_student(statistics, rest, inverse_temperature, HAS_LABELS)
    store_student(partial_ptr + (rows * tl.num_programs(1) + split) * STUDENT_FIELDS, inside, statistics, y_label)


def on_chip_tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_logprobs: Tensor, teacher_ids: Tensor, *rest: Any
) -> SparseTokens:
    """Per-token results with no logit but the stored ids' in memory; `rest` are the operator's arguments from there."""
    s = prepared(hidden, teacher_logprobs, teacher_ids, *rest)
    (N, width), V, k, device = hidden.shape, weight.shape[0], teacher_ids.shape[1], hidden.device
    tiles = tiling(N, V, hidden)
    partial = torch.empty(N, tiles.splits, STUDENT_FIELDS.value, dtype=torch.float32, device=device)
    gathered = torch.empty(N, k, dtype=torch.float32, device=device)
    launch(wrap_triton(linear_topk_kl_statistics), (tiles.blocks, tiles.splits),
        hidden, weight, contiguous(bias), s.teacher_logprobs, s.teacher_ids, s.labels, s.scalars, partial, gathered,
        N, V, width, k, hidden.stride(0), weight.stride(0), tiles.split_size,
        HAS_LABELS=s.labels is not None, HAS_BIAS=bias is not None, CAP=s.cap, **tiles.options(),
    )  # fmt: skip
    return token_statistics(s, partial, gathered, V)


def linear_topk_kl(*arguments: Any) -> tuple[Tensor, ...]:
    """The operator's kernel: (loss, stats, gradients or empty tensors of hidden, weight, bias)."""
    *inputs, compute_dtype, reduction, num_items, need_hidden, need_weight, need_bias = arguments
    hidden, weight, *_ = inputs
    gradient = (need_hidden or need_weight or need_bias) and reduction != NONE
    if gradient or not suits_chip(compute_dtype or hidden.dtype, hidden, weight):
        return _tiled(*arguments)
    tokens = on_chip_tokens(*inputs)
    return without_gradients(hidden, tokens.losses, tokens.stats, reduction, num_items)
