"""`linear_entropy_kl`: by the shared tile loop, or, where no gradient is asked for, with the logits on chip.

The tile loop takes logits from the vendor's matrix product and overwrites them by their gradient (`entropy_kl_row`).
The kernel here multiplies and folds in one: a program takes BM tokens through a part of the vocabulary, BN columns of
both models at a time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3kernels.compat import wrap_triton
from e3kernels.contract import REDUCTIONS
from e3kernels.tiled.linear import TileKernel, kernels
from e3kernels.tiled.linear_entropy_kl import linear_loss
from e3kernels.triton.entropy_kl import (
    DenseTokens,
    entropy_kl,
    entropy_kl_backward,
    prepared,
    rows_at_once,
    token_statistics,
)
from e3kernels.triton.launch import contiguous, launch
from e3kernels.triton.on_chip import ADDED_ROWS, TILE_LOGITS, projected_tile, suits_chip, tiling
from e3kernels.triton.reduction import without_gradients
from e3kernels.triton.scalars import TEMPERATURE, scalar, student_transform, teacher_transform
from e3kernels.triton.statistics import JSD, PAIR_FIELDS, fold_pair, no_pair, store_pair

NONE = REDUCTIONS.index("none")


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
    transform_s = student_transform(scalars_ptr, CAP_S)
    transform_t = teacher_transform(scalars_ptr, CAP_T)
    label = tl.load(labels_ptr + rows, mask=inside, other=-1) if HAS_LABELS else tl.full([BM], -1, tl.int64)
    y_label = tl.zeros([BM], tl.float32)
    pair = no_pair(BM)
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, V), BN):
        columns = start + tl.arange(0, BN)
        yt = projected_tile(
            teacher_ptr, teacher_weight_ptr, teacher_bias_ptr, rows, columns, N, V, teacher_width,
            teacher_stride, teacher_weight_stride, transform_t, HAS_BIAS_T, BM, BN, BK, UPCAST,
        )  # fmt: skip
        y = projected_tile(
            student_ptr, student_weight_ptr, student_bias_ptr, rows, columns, N, V, student_width,
            student_stride, student_weight_stride, transform_s, HAS_BIAS_S, BM, BN, BK, UPCAST,
        )  # fmt: skip
        if HAS_LABELS:
            y_label += tl.sum(tl.where(columns[None, :] == label[:, None], y, 0.0), axis=1)
        pair = fold_pair(pair, y, yt, inverse_temperature, DIVERGENCE, HAS_LABELS)
    store_pair(partial_ptr + (rows * tl.num_programs(1) + split) * PAIR_FIELDS, inside, pair, y_label)


def entropy_kl_tile(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """entropy_kl's kernel for a tile of logits that nobody else needs: their gradient takes their place."""
    *inputs, _, _, need_student = arguments
    if not need_student:
        return entropy_kl(*arguments)
    call = prepared(*inputs)
    stats, losses = rows_at_once(call, call.student.new_ones((), dtype=torch.float32), call.student)
    return losses.sum(), stats, call.student


_tiled, linear_entropy_kl_backward = kernels(
    linear_loss, TileKernel(entropy_kl_tile, entropy_kl_backward, TILE_LOGITS, added_rows=ADDED_ROWS)
)


def on_chip_tokens(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, teacher_bias: Tensor | None, labels: Tensor | None, mask: Tensor | None, *codes: Any,
) -> DenseTokens:  # fmt: skip
    """Per-token results with no logit in memory; forward and reverse divergence, one dtype."""
    d = prepared(student_hidden, teacher_hidden, labels, mask, *codes)
    (N, width), V, device = student_hidden.shape, student_weight.shape[0], student_hidden.device
    tiles = tiling(N, V, student_hidden)
    partial = torch.empty(N, tiles.splits, PAIR_FIELDS.value, dtype=torch.float32, device=device)
    flags = d.flags()
    del flags["HAS_MASK"]
    launch(wrap_triton(linear_entropy_kl_statistics), (tiles.blocks, tiles.splits),
        student_hidden, student_weight, contiguous(student_bias),
        teacher_hidden, teacher_weight, contiguous(teacher_bias),
        d.labels, d.scalars, partial, N, V, width, teacher_hidden.shape[1],
        student_hidden.stride(0), student_weight.stride(0), teacher_hidden.stride(0), teacher_weight.stride(0),
        tiles.split_size,
        HAS_BIAS_S=student_bias is not None, HAS_BIAS_T=teacher_bias is not None, **flags, **tiles.options(),
    )  # fmt: skip
    return token_statistics(d, partial, None, V)


def linear_entropy_kl(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, teacher_bias: Tensor | None, labels: Tensor | None, token_mask: Tensor | None,
    scalars: Tensor, weighting: int, divergence: int, ignore_index: int, compute_dtype: torch.dtype | None,
    reduction: int, num_items: Tensor | None, *needs: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator's kernel: (loss, stats, gradients or empty tensors of hidden, weight, bias)."""
    student, teacher = (student_hidden, student_weight, student_bias), (teacher_hidden, teacher_weight, teacher_bias)
    codes = (scalars, weighting, divergence, ignore_index)
    matrices = student_hidden, student_weight, teacher_hidden, teacher_weight
    gradient = any(needs) and reduction != NONE
    if gradient or divergence == JSD.value or not suits_chip(compute_dtype or student_hidden.dtype, *matrices):
        return _tiled(*student, *teacher, labels, token_mask, *codes, compute_dtype, reduction, num_items, *needs)
    tokens = on_chip_tokens(*student, *teacher, labels, token_mask, *codes)
    return without_gradients(student_hidden, tokens.losses, tokens.stats, reduction, num_items)
