"""Alternate: remove every second layer, without looking."""

from __future__ import annotations

from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import Search


def alternate(problem: SearchProblem) -> Search:
    """Every second layer from the last but one towards the input (Sajjad et al., arXiv 2004.03844); where these are not
    enough, the others in the same order."""
    deepest_first = problem.free[::-1]
    removed = sorted((deepest_first[1::2] + deepest_first[::2])[: problem.drop])
    yield {"removed": removed}
    return removed
