"""Contiguous: measure every run of neighbouring layers, there are few of them."""

from __future__ import annotations

from e3pruner.mask_search.method import Search, search_method
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import run_starts


@search_method("contiguous")
def contiguous(problem: SearchProblem) -> Search:
    """Layers l … l + n − 1 go, l = argmin mean KL without them: the best that one cut can do on these tokens.

    Raises `ValueError` if no n neighbouring layers may all go.
    """
    starts = run_starts(problem)
    problem.expect(len(starts) * len(problem.batches))
    runs = [list(range(start, start + problem.drop)) for start in starts]
    scores = problem.score([problem.mask(run) for run in runs])
    removed = runs[scores.index(min(scores))]
    yield {"score": min(scores), "scores": dict(zip(map(str, starts), scores, strict=True)), "removed": removed}
    return removed
