"""First-n: remove the shallowest layers, without looking."""

from __future__ import annotations

from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import Search


def first_n(problem: SearchProblem) -> Search:
    """The first `drop` layers that may go."""
    removed = problem.free[: problem.drop]
    yield {"removed": removed}
    return removed
