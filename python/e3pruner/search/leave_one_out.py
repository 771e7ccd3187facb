"""Leave-one-out: remove the layers that are missed least when they are the only ones gone."""

from __future__ import annotations

from e3pruner.search.problem import SearchProblem
from e3pruner.search.protocol import Search, leave_one_out_scores, lowest


def leave_one_out(problem: SearchProblem) -> Search:
    """I_l = mean KL without layer l, the lowest go (Shortened LLaMA, arXiv 2402.02834, KL for perplexity)."""
    problem.expect(problem.num_layers * len(problem.batches))
    importance = leave_one_out_scores(problem, range(len(problem.batches)))
    removed = lowest(importance, problem.free, problem.drop)
    yield {"importance": importance, "removed": removed}
    return removed
