"""Gumbel-TopK: learn one logit a layer from sampled exact-K masks (E³-Pruner, arXiv 2511.17205), forward only."""

from __future__ import annotations

import math

import torch

import e3kernels as e3k
from e3pruner.search.problem import SearchProblem
from e3pruner.search.protocol import Search, leave_one_out_scores, lowest


def gumbel_topk(
    problem: SearchProblem,
    *,
    steps: int = 40,
    samples: int = 4,
    lr: float = 0.05,
    noise=(0.7, 0.2),
    log=True,
    start_batches=1,
    curriculum=0.0,
) -> Search:
    free = problem.free
    importance = leave_one_out_scores(problem, range(start_batches))
    start = torch.tensor([math.log(max(importance[layer], 1e-12)) for layer in free], dtype=torch.float64)
    theta = ((start - start.mean()) / start.std(correction=0)).requires_grad_()
    adam = torch.optim.Adam([theta], lr=lr)
    yield {"importance": importance, "removed": lowest(importance, free, problem.drop)}
    for step in range(steps):
        t = step / steps
        drop = problem.drop if t >= curriculum else max(1, round(problem.drop * (1 - (1 - t / curriculum) ** 3)))
        kappa = noise[0] * (noise[1] / noise[0]) ** (step / max(1, steps - 1))
        mask, probs = e3k.gumbel_topk(
            theta.detach().expand(samples, -1),
            len(free) - drop,
            tau=kappa,
            noise_scale=kappa,
            seed=problem.seed,
            step=step,
            relaxation="softmax",
        )
        gone = [[layer for layer, keep in zip(free, row, strict=True) if not keep] for row in mask.tolist()]
        scores = problem.score([problem.mask(r) for r in gone], [step % len(problem.batches)])
        value = torch.tensor(scores, dtype=torch.float64)
        if log:
            value = value.log()
        adv = (value - value.mean()) * samples / (samples - 1)
        order = probs.argsort(dim=-1, descending=True)
        z = theta.expand(samples, -1).gather(1, order) / kappa
        tail = z.flip(1).logcumsumexp(1).flip(1)
        logp = (z - tail)[:, : len(free) - drop].sum(1)
        adam.zero_grad()
        with torch.enable_grad():
            z = theta.expand(samples, -1).gather(1, order) / kappa
            tail = z.flip(1).logcumsumexp(1).flip(1)
            logp = (z - tail)[:, : len(free) - drop].sum(1)
            ((adv * logp).mean()).backward()
        adam.step()
        values = theta.detach().tolist()
        removed = sorted(sorted(free, key=lambda l: values[free.index(l)])[: problem.drop])
        yield {"score": sum(scores) / samples, "removed": removed, "logits": values}
    return removed
