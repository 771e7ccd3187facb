"""Random: the floor that every method must beat."""

from __future__ import annotations

import torch

from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import Search, layers_of, sampled


def random_subset(problem: SearchProblem) -> Search:
    """`drop` layers drawn uniformly without replacement from those that may go."""
    uniform = torch.zeros(len(problem.free), dtype=torch.float64)
    removed = layers_of(problem, sampled(problem, uniform, 1.0, 0))
    yield {"removed": removed}
    return removed
