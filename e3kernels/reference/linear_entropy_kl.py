"""`linear_entropy_kl` as it is defined: all logits, then `entropy_kl`, and its gradient back through the head."""

from typing import Any

import torch
from torch import Tensor

from e3kernels.reference.entropy_kl import entropy_kl


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """z = h·Wᵀ + b, (N, V)."""
    return torch.nn.functional.linear(hidden, weight, bias)


def head_gradients(grad_logits: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """∂/∂h = g·W (N, H), ∂/∂W = gᵀ·h (V, H), ∂/∂b = Σ g (V,), for the gradient g (N, V) of the logits."""
    return grad_logits @ weight, grad_logits.t() @ hidden, grad_logits.sum(0)


def linear_entropy_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """(loss, stats, gradients of hidden, weight and bias); `rest` are the arguments of `entropy_kl` from labels on, up
    to `num_items`. The backends compute it tile by tile (`e3kernels.tiled`)."""
    student = linear_logits(student_hidden, student_weight, student_bias)
    teacher = linear_logits(teacher_hidden, teacher_weight, teacher_bias)
    loss, stats, grad = entropy_kl(student, teacher, *rest, True)
    return loss, stats, *head_gradients(grad, student_hidden, student_weight)
