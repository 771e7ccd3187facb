"""Reference `entropy_kl`: the divergence from a dense teacher, weighted by the teacher's entropy."""

from typing import Any

import torch
from torch import Tensor

from e3kernels.reference.columns import WHOLE, Columns
from e3kernels.reference.divergence import divergence, entropy
from e3kernels.reference.token_loss import (
    Objective,
    TeacherTerm,
    TokenLoss,
    forward,
    model_logits,
    token_loss,
    valid_tokens,
)


def _tokens(
    columns: Columns,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    token_mask: Tensor | None,
    scalars: Tensor,
    weighting: int,
    divergence_code: int,
    ignore_index: int,
) -> TokenLoss:
    options = Objective.from_arguments(scalars[:6], weighting, divergence_code, ignore_index)
    teacher_softcap, teacher_scale = scalars[6:].tolist()
    teacher_logits, _ = model_logits(teacher, teacher_scale, teacher_softcap)
    log_p = columns.log_softmax(teacher_logits / options.temperature)
    support = torch.full_like(log_p[:, 0], columns.count(log_p))

    def measure(u: Tensor) -> TeacherTerm:
        log_q = columns.log_softmax(u)
        value, g = divergence(log_p, log_q, options.divergence, options.beta)

        def gradient() -> Tensor:
            return g - log_q.exp() * columns.total(g.sum(-1, keepdim=True))

        return TeacherTerm(columns.total(value), columns.total(entropy(log_p)), support, gradient)

    valid = valid_tokens(student, labels, token_mask, ignore_index)
    return token_loss(student, measure, labels, valid, options, columns)


def entropy_kl(*arguments: Any, columns: Columns = WHOLE) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of `e3::entropy_kl.reference`."""
    *inputs, reduction, num_items, need_student = arguments
    return forward(_tokens(columns, *inputs), reduction, num_items, need_student)


def entropy_kl_backward(grad_loss: Tensor, *inputs: Any, columns: Columns = WHOLE) -> Tensor:
    """Kernel of `e3::entropy_kl_backward.reference`: one incoming gradient per token."""
    return _tokens(columns, *inputs).gradient(grad_loss)
