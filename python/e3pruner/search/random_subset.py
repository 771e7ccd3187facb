"""Random: the floor that every method must beat."""

from __future__ import annotations

import torch

import e3kernels as e3k
from e3pruner.search.problem import SearchProblem
from e3pruner.search.protocol import Search


def random_subset(problem: SearchProblem) -> Search:
    """`drop` layers drawn uniformly without replacement from those that may go."""
    uniform = torch.zeros(len(problem.free), dtype=torch.float64)
    mask = e3k.gumbel_topk(uniform, problem.drop, seed=problem.seed).mask
    removed = [layer for layer, gone in zip(problem.free, mask.tolist(), strict=True) if gone]
    yield {"removed": removed}
    return removed
