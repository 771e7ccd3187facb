"""How the divergence changes with the gates of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import e3kernels as e3k
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.models import gated
from e3pruner.storage import fingerprint


def gate_gradient(problem: SearchProblem, gates: Sequence[float], batch: int) -> tuple[float, list[float]]:
    """The mean KL per token on one batch, layer l giving h + m_l·(f_l(h) − h), and ∂KL/∂m_l, for L gates m.

    It costs a forward and a backward pass through all layers and the output head.
    """

    def compute(number: int) -> list[float]:
        rows, head = problem.rows(number), problem.head
        teacher = rows.at_counted(problem.teacher_of(number))
        m = torch.tensor(gates, dtype=torch.float32, device=teacher.device, requires_grad=True)
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        with torch.enable_grad(), gated(problem.model, m):
            loss: Any = e3k.linear_entropy_kl(
                rows.at_counted(problem.forward.dense(rows.inputs).flatten(0, 1)),
                weight,
                teacher,
                weight,
                student_bias=bias,
                teacher_bias=bias,
                weighting="none",
                student_softcap=head.softcap,
                teacher_softcap=head.softcap,
                student_scale=head.scale,
                teacher_scale=head.scale,
            )
            (slopes,) = torch.autograd.grad(loss, m)
        return [loss.item(), *slopes.tolist()]

    key = f"gates {batch} {fingerprint(list(gates))[:32]}"
    loss, *slopes = problem.measure(key, batch, compute, layer_passes=2, heads=2)
    return loss, slopes
