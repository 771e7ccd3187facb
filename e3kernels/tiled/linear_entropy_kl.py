"""`linear_entropy_kl` by the tile loop, for any backend's `entropy_kl`; the portable one has the reference's."""

import torch
from torch import Tensor

from e3kernels.reference.entropy_kl import entropy_kl, entropy_kl_backward
from e3kernels.tiled.linear import REFERENCE_LOGITS, Head, LinearLoss, TileKernel, kernels, product_dtype

KERNEL = TileKernel(entropy_kl, entropy_kl_backward, REFERENCE_LOGITS)


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape and first.stride() == second.stride()


def linear_loss(
    kernel: TileKernel,
    needs: tuple[bool, bool, bool],
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    token_mask: Tensor | None,
    scalars: Tensor,
    weighting: int,
    divergence: int,
    ignore_index: int,
    compute_dtype: torch.dtype | None,
) -> LinearLoss:
    """The linear loss of the operator's arguments, with `kernel` as its dense operation."""
    dtype = product_dtype(student_hidden, compute_dtype)
    student = Head(student_hidden, student_weight, student_bias, dtype, kernel.products)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, dtype, kernel.products)
    shared = _same(student_weight, teacher_weight) and _same(student_bias, teacher_bias)

    def tile(rows: slice, workspace: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits, teacher_logits = workspace.chunk(2)
        if shared:  # one head for both models: its weight is read, and cast, once
            student.project(torch.cat((student_hidden[rows], teacher_hidden[rows])), workspace)
        else:
            student.project(student_hidden[rows], logits)
            teacher.project(teacher_hidden[rows], teacher_logits)
        return logits, (teacher_logits,)

    codes = (scalars, weighting, divergence, ignore_index)
    return LinearLoss(student, 2, tile, labels, token_mask, codes, needs, kernel)


linear_entropy_kl, linear_entropy_kl_backward = kernels(linear_loss, KERNEL)
