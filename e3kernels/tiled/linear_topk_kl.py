"""`linear_topk_kl` by the tile loop, for any backend's `topk_kl`; the portable one has the reference's."""

import torch
from torch import Tensor

from e3kernels.reference.topk_kl import topk_kl, topk_kl_backward
from e3kernels.tiled.linear import REFERENCE_LOGITS, Head, LinearLoss, TileKernel, kernels, product_dtype

KERNEL = TileKernel(topk_kl, topk_kl_backward, REFERENCE_LOGITS)


def linear_loss(
    kernel: TileKernel,
    needs: tuple[bool, bool, bool],
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    labels: Tensor | None,
    token_mask: Tensor | None,
    scalars: Tensor,
    weighting: int,
    divergence: int,
    ignore_index: int,
    tail: int,
    compute_dtype: torch.dtype | None,
) -> LinearLoss:
    """The linear loss of the operator's arguments, with `kernel` as its sparse operation."""
    dtype = product_dtype(student_hidden, compute_dtype)
    student = Head(student_hidden, student_weight, student_bias, dtype, kernel.products)

    def tile(rows: slice, workspace: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return student.project(student_hidden[rows], workspace), (teacher_logprobs[rows], teacher_ids[rows])

    codes = (scalars, weighting, divergence, ignore_index, tail)
    return LinearLoss(student, 1, tile, labels, token_mask, codes, needs, kernel)


linear_topk_kl, linear_topk_kl_backward = kernels(linear_loss, KERNEL)
