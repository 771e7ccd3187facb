"""Block influence: remove the layers that turn the hidden state least."""

from __future__ import annotations

from torch import Tensor

from e3pruner.mask_search.method import Search, search_method
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import lowest, state_distances


@search_method("bi", quotas=True)
def bi(problem: SearchProblem) -> Search:
    """BI_l = 1 − E cos(h_l, h_{l+1}), the lowest go (ShortGPT, arXiv 2403.03853). One dense pass per batch, no head."""
    problem.expect(len(problem.batches))
    influence = state_distances(problem, 1, cosine_distance)
    removed = lowest(problem, influence)
    yield {"importance": influence, "removed": removed}
    return removed


def cosine_distance(cosine: Tensor) -> Tensor:
    return 1 - cosine
