"""Leave-one-out: remove the layers that are missed least when they are the only ones gone."""

from __future__ import annotations

from e3pruner.mask_search.method import Search, search_method
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import leave_one_out_scores, lowest


@search_method("leave-one-out", sublayers=True, quotas=True)
def leave_one_out(problem: SearchProblem) -> Search:
    """I_l = mean KL without layer l, the lowest go."""
    return _by("kl", problem)


@search_method("leave-one-out-perplexity", sublayers=True, quotas=True)
def leave_one_out_perplexity(problem: SearchProblem) -> Search:
    """I_l = mean negative log-likelihood of the text without layer l, the log of the perplexity, the lowest go
    (Shortened LLaMA, arXiv 2402.02834)."""
    return _by("nll", problem)


def _by(measure: str, problem: SearchProblem) -> Search:
    problem.expect(problem.units.count * len(problem.batches))
    importance = leave_one_out_scores(problem, range(len(problem.batches)), measure)
    removed = lowest(problem, importance)
    yield {"importance": importance, "removed": removed}
    return removed
