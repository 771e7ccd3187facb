"""Angular distance: remove the contiguous run of layers that turns the hidden state least."""

from __future__ import annotations

import math

from torch import Tensor

from e3pruner.mask_search.method import Search, search_method
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import run_starts, state_distances


@search_method("angular")
def angular(problem: SearchProblem) -> Search:
    """Layers l … l + n − 1 go, l = argmin E arccos(cos(h_l, h_{l+n}))/π over all tokens (after arXiv 2403.17887).

    One dense pass per batch, no head. Raises `ValueError` if no n neighbouring layers may all go.
    """
    starts = run_starts(problem)
    problem.expect(len(problem.batches))
    distance = state_distances(problem, problem.drop, angle)
    best = min(starts, key=lambda start: distance[start])
    removed = list(range(best, best + problem.drop))
    yield {"scores": distance, "removed": removed}
    return removed


def angle(cosine: Tensor) -> Tensor:
    return cosine.clamp(-1, 1).arccos() / math.pi
