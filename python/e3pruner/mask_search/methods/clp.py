"""CLP: slide a valley of soft gates along the layers, downhill on the divergence, and remove the layers in it."""

from __future__ import annotations

import torch
from torch import Tensor

from e3pruner.mask_search.gradient import gate_gradient
from e3pruner.mask_search.method import Search, search_method
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import run_starts
from e3pruner.vocabulary import check_integer, check_positive

_TEMPERATURES = 2.0, 0.25  # in layers: how soft the valley's edges are at first and at last


@search_method("clp")
def clp(problem: SearchProblem, *, steps: int = 40, lr: float = 0.5) -> Search:
    """Adam on the place s of a run of n layers (after arXiv 2510.23652, the form of the gate is ours).

    Layer l has the gate m_l = 1 − σ((l − s + ½)/τ)·σ((s + n − ½ − l)/τ), which is concave (凹) along the layers: near 0
    in the run, near 1 outside it. The loss is the KL of the model with these gates; τ falls geometrically, s starts in
    the middle and moves by about `lr` layers a step. The whole run that is nearest to the last s goes.

    Every step costs a forward and a backward pass through all layers. Raises `ValueError` if no n neighbouring layers
    may all go.
    """
    check_integer("steps", steps, 1)
    check_positive("lr", lr)
    starts = run_starts(problem)
    problem.expect(steps)
    place = torch.tensor((starts[0] + starts[-1]) / 2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([place], lr=lr)
    for step in range(steps):
        hot, cold = _TEMPERATURES
        tau = hot * (cold / hot) ** (step / max(1, steps - 1))
        with torch.enable_grad():
            gates = concave_gates(place, problem.drop, problem.num_layers, tau)
        loss, slopes = gate_gradient(problem, gates.tolist(), step % len(problem.batches))
        (place.grad,) = torch.autograd.grad(gates, place, gates.new_tensor(slopes))
        adam.step()
        with torch.no_grad():
            place.clamp_(starts[0], starts[-1])
        first = min(starts, key=lambda start: abs(start - place.item()))
        removed = list(range(first, first + problem.drop))
        yield {"score": loss, "removed": removed, "place": place.item()}
    return removed


def concave_gates(place: Tensor, width: int, num_layers: int, tau: float) -> Tensor:
    """The gates m (L,) of the run of `width` layers that begins at `place`."""
    layers = torch.arange(num_layers, dtype=place.dtype)
    rising = ((layers - place + 0.5) / tau).sigmoid()
    falling = ((place + width - 0.5 - layers) / tau).sigmoid()
    return 1 - rising * falling
