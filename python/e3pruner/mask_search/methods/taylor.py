"""Taylor: remove the layers whose weights the loss would miss least to first order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from e3pruner.mask_search.method import Search, search_method
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import lowest
from e3pruner.models.stack import check_unquantised
from e3pruner.models.streaming import check_resident


@search_method("taylor", quotas=True)
def taylor(problem: SearchProblem) -> Search:
    """I_l = Σ |W·∂NLL/∂W| over the weights of layer l, the lowest go (Shortened LLaMA, arXiv 2402.02834).

    One forward and one backward pass per batch, which holds the gradients of all layers at once.
    """
    numbers = range(len(problem.batches))
    problem.expect(len(numbers))

    def saliency(batch: int) -> list[float]:
        return _saliency(problem, batch)

    # The dense pass is paid for as such: what comes on top are the head, and a backward pass that reaches the weights.
    table = [problem.measure(f"taylor {b}", b, saliency, over="predicted", layer_passes=2, heads=2) for b in numbers]
    importance = problem.calibration.mean(table, numbers, "predicted")
    removed = lowest(problem, importance)
    yield {"importance": importance, "removed": removed}
    return removed


def _saliency(problem: SearchProblem, batch: int) -> list[float]:
    check_unquantised("model", problem.forward.model, "method='taylor' needs the gradients of its weights")
    check_resident("model", problem.forward.model, "method='taylor' needs the gradients of its weights: load it with")
    rows = problem.rows(batch)
    weights = [list(layer.parameters()) for layer in problem.forward.layers]
    flat = [weight for own in weights for weight in own]
    with torch.enable_grad(), _requiring_grad(flat):
        hidden = rows.at_predicted(problem.forward.dense(rows.inputs))
        loss = F.cross_entropy(problem.head.logits(hidden).float(), rows.predicted)
        slopes = iter(torch.autograd.grad(loss, flat, materialize_grads=True, allow_unused=True))
    return [sum((w.float() * next(slopes).float()).abs().sum().item() for w in own) for own in weights]


@contextmanager
def _requiring_grad(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside the block all `parameters` require a gradient, frozen ones too."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
