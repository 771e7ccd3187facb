"""How the divergence changes with the gates of the layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import e3kernels as e3k
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.models import gated
from e3pruner.models.stack import check_unquantised
from e3pruner.storage import fingerprint


def gate_gradient(problem: SearchProblem, gates: Sequence[float], batch: int) -> tuple[float, list[float]]:
    """The mean KL per token on one batch, layer l giving h + m_l·(f_l(h) − h), and ∂KL/∂m_l, for L gates m.

    It costs a forward and a backward pass through all layers and the output head.
    """

    # Kernels of quantised weights need not have a backward pass: one of bitsandbytes gives wrong gradients on a CPU.
    check_unquantised("model", problem.model, "a method that follows gradients of the gates needs others")

    def compute(number: int) -> list[float]:
        rows, head = problem.rows(number), problem.head.detached()
        teacher = rows.at_counted(problem.teacher_of(number))
        m = torch.tensor(gates, dtype=torch.float32, device=teacher.device, requires_grad=True)
        with torch.enable_grad(), gated(problem.model, m):
            loss = e3k.linear_entropy_kl(
                student_hidden=rows.at_counted(problem.forward.dense(rows.inputs).flatten(0, 1)),
                teacher_hidden=teacher,
                weighting="none",
                **head.arguments("student"),
                **head.arguments("teacher"),
            )
            (slopes,) = torch.autograd.grad(loss, m)
        return [loss.item(), *slopes.tolist()]

    key = f"gates {batch} {fingerprint(list(gates))[:32]}"
    loss, *slopes = problem.measure(key, batch, compute, layer_passes=2, heads=2)
    return loss, slopes
