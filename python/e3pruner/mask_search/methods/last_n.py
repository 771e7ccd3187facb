"""Last-n: remove the deepest layers, without looking."""

from __future__ import annotations

from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import Search


def last_n(problem: SearchProblem) -> Search:
    """The last `drop` layers that may go."""
    removed = problem.free[-problem.drop :]
    yield {"removed": removed}
    return removed
