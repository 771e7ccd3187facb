"""`linear_topk_kl` as it is defined: all logits, then `topk_kl`, and its gradient back through the head."""

from typing import Any

from torch import Tensor

from e3kernels.reference.linear_entropy_kl import head_gradients, linear_logits
from e3kernels.reference.topk_kl import topk_kl


def linear_topk_kl(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """(loss, stats, gradients of hidden, weight and bias); `rest` are the arguments of `topk_kl` from the teacher's
    log-probabilities on, up to `num_items`. The backends compute it tile by tile (`e3kernels.tiled`)."""
    loss, stats, grad = topk_kl(linear_logits(student_hidden, student_weight, student_bias), *rest, True)
    return loss, stats, *head_gradients(grad, student_hidden, student_weight)
