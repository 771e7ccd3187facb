"""Straight-through: E³-Pruner's plain recipe, gradients of hard masks through the sampler. A rival, not the default."""

from __future__ import annotations

import torch

import e3kernels as e3k
from e3pruner.mask_search.gradient import gate_gradient
from e3pruner.mask_search.method import Search, search_method
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import by_unit, leave_one_out_scores, log_z_scores, lowest
from e3pruner.vocabulary import check_choice, check_integer, check_positive

OPTIMIZERS = ("adam", "sgd")
CURRICULA = ("cubic", "linear", "none")
_MOMENTUM = 0.9
_LAST_TAU = 0.05
_GROWTH_SHARE = 0.6  # of the steps, in which the number of removed layers grows
_COLD_SHARE = 0.2  # of the steps, the last ones, in which the noise falls to 0


@search_method("straight-through")
def straight_through(
    problem: SearchProblem,
    *,
    steps: int = 60,
    lr: float = 0.05,
    optimizer: str = "adam",
    noise: float = 0.5,
    tau: float = 1.0,
    curriculum: str = "cubic",
) -> Search:
    """Gradient descent on θ, m̂ = mask + p − stop_gradient(p), the loss the KL of the hard mask (arXiv 2511.17205).

    θ starts at the z-scores of the log of the leave-one-out KL. Each step samples one mask, removed layers run too. The
    sampler's temperature falls geometrically from `tau` to 0.05, the `noise` to 0 over the last fifth; `curriculum` is
    how the number of removed layers grows over the first 0.6 of the steps: n·(1 − (1 − t)³), n·t, or n at once. The
    layers with the lowest θ go. `optimizer` "adam" takes no account of a gradient's size, "sgd" (momentum 0.9) does.
    """
    check_integer("steps", steps, 1)
    check_positive("lr", lr)
    check_positive("noise", noise)
    check_positive("tau", tau)
    check_choice("optimizer", optimizer, OPTIMIZERS)
    check_choice("curriculum", curriculum, CURRICULA)
    count, free = len(problem.batches), problem.free
    problem.expect(problem.units.count * count + steps)
    importance = leave_one_out_scores(problem, range(count))
    yield {"importance": importance, "removed": lowest(problem, importance)}

    theta = log_z_scores(problem, importance).requires_grad_()
    if optimizer == "adam":
        descent: torch.optim.Optimizer = torch.optim.Adam([theta], lr=lr)
    else:
        descent = torch.optim.SGD([theta], lr=lr, momentum=_MOMENTUM)
    for step in range(steps):
        gone = removed_layers(problem.drop, step / steps, curriculum)
        with torch.enable_grad():
            mask, probs = e3k.gumbel_topk(
                theta,
                len(free) - gone,
                tau=tau * (_LAST_TAU / tau) ** (step / max(1, steps - 1)),
                noise_scale=noise * min(1.0, (1 - step / steps) / _COLD_SHARE),
                seed=problem.seed,
                step=step,
            )
        gates = [1.0] * problem.num_layers
        for layer, kept in zip(free, mask.tolist(), strict=True):
            gates[layer] = kept
        loss, slopes = gate_gradient(problem, gates, step % count)
        (theta.grad,) = torch.autograd.grad(probs, theta, probs.new_tensor([slopes[layer] for layer in free]))
        descent.step()
        removed = lowest(problem, by_unit(problem, theta.detach()))
        yield {"score": loss, "removed": removed, "logits": theta.tolist(), "drop": gone}
    return removed


def removed_layers(drop: int, progress: float, curriculum: str) -> int:
    """How many layers a step removes, at least one, `progress` of the steps in [0, 1) being done."""
    t = min(1.0, progress / _GROWTH_SHARE)
    share = {"cubic": 1 - (1 - t) ** 3, "linear": t, "none": 1.0}[curriculum]
    return max(1, round(drop * share))
