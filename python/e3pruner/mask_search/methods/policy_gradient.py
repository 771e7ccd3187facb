"""Policy gradient: raise the probability of sampled masks that did better than those before them."""

from __future__ import annotations

import torch
from torch import Tensor

import e3kernels as e3k
from e3pruner.mask_search.method import Search, search_method
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import (
    by_unit,
    fitting,
    leave_one_out_scores,
    log_z_scores,
    lowest,
    removed_share,
    scores_of,
)
from e3pruner.vocabulary import check_integer, check_positive

_BASELINE_DECAY = 0.8


@search_method("policy-gradient", sublayers=True)
def policy_gradient(
    problem: SearchProblem, *, steps: int = 40, samples: int = 4, lr: float = 0.05, noise: float = 0.7
) -> Search:
    """Adam on E[(log KL(m) − baseline)·∇ log P(m; θ)], P the Plackett–Luce law of θ + κ·g (REINFORCE, Williams 1992).

    θ starts at the z-scores of the log of the leave-one-out KL, the baseline is a moving average, κ = `noise`. Forward
    passes only; a step's masks share one batch. The layers with the lowest θ go.
    """
    check_integer("steps", steps, 1)
    check_integer("samples", samples, 1)
    check_positive("lr", lr)
    check_positive("noise", noise)
    count = len(problem.batches)
    problem.expect(problem.units.count * count + steps * samples)
    importance = leave_one_out_scores(problem, range(count))
    yield {"importance": importance, "removed": lowest(problem, importance)}

    logits = log_z_scores(problem, importance)
    adam = torch.optim.Adam([logits], lr=lr)
    baseline = None
    for step in range(steps):
        keep = len(problem.free) - problem.drop
        # With τ = κ the softmax relaxation ranks the layers by their noisy scores.
        mask, probs = e3k.gumbel_topk(
            logits.expand(samples, -1),
            keep,
            tau=noise,
            noise_scale=noise,
            seed=problem.seed,
            step=step,
            relaxation="softmax",
        )
        removed_masks = fitting(problem, 1 - mask, logits)
        scores = scores_of(problem, removed_masks, [step % count])
        reward = torch.tensor(scores, dtype=torch.float64).log()
        mean = reward.mean()
        baseline = mean if baseline is None else _BASELINE_DECAY * baseline + (1 - _BASELINE_DECAY) * mean
        order = probs.argsort(dim=-1, descending=True)
        gradients = torch.stack([plackett_luce_gradient(logits / noise, row, keep) / noise for row in order])
        logits.grad = ((reward - baseline)[:, None] * gradients).mean(0)
        adam.step()
        removed = lowest(problem, by_unit(problem, logits))
        yield {
            "score": sum(scores) / samples,
            "removed": removed,
            "removed_share": removed_share(problem, removed_masks),
            "logits": logits.tolist(),
        }
    return removed


def plackett_luce_gradient(logits: Tensor, order: Tensor, count: int) -> Tensor:
    """∂/∂z (F,) of log P = Σ_{i < count} (z_{o_i} − log Σ_{j ≥ i} exp z_{o_j}), the first places of `order` (F,)."""
    ordered = logits[order]
    remaining = ordered.flip(0).logcumsumexp(0).flip(0)
    placed = (torch.arange(len(order)) < count).to(logits.dtype)
    gradient = placed - (ordered[:, None] - remaining).exp().tril().mul(placed).sum(1)
    return torch.zeros_like(logits).index_put((order,), gradient)
