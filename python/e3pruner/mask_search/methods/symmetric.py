"""Symmetric: remove the middle, without looking."""

from __future__ import annotations

from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import Search


def symmetric(problem: SearchProblem) -> Search:
    """As many layers stay at the input as at the output (Sajjad et al., arXiv 2004.03844); of an odd number, one more
    at the input."""
    first = (len(problem.free) - problem.drop + 1) // 2
    removed = problem.free[first : first + problem.drop]
    yield {"removed": removed}
    return removed
