"""Greedy: remove the layer that is missed least, look again, remove the next."""

from __future__ import annotations

from e3pruner.mask_search.method import Search, search_method
from e3pruner.mask_search.problem import SearchProblem


@search_method("greedy", sublayers=True, quotas=True)
def greedy(problem: SearchProblem) -> Search:
    """r ← r ∪ {argmin_l mean KL without r ∪ {l}}, `drop` times (SLEB, arXiv 2402.09025, with KL in place of NLL)."""
    candidates = len(problem.free)
    problem.expect(sum(candidates - step for step in range(problem.drop)) * len(problem.batches))
    removed: list[int] = []
    for _ in range(problem.drop):
        left = [unit for unit in problem.free if unit not in removed and _can_go(problem, [*removed, unit])]
        scores = problem.score([problem.mask([*removed, layer]) for layer in left])
        score = min(scores)
        removed.append(left[scores.index(score)])
        yield {"score": score, "scores": dict(zip(map(str, left), scores, strict=True)), "removed": sorted(removed)}
    return removed


def _can_go(problem: SearchProblem, units: list[int]) -> bool:
    """Whether there is a set of units that may go and holds `units`."""
    return problem.units.cheapest([0.0] * problem.units.count, gone=units) is not None
