"""Block influence: remove the layers that turn the hidden state least."""

from __future__ import annotations

from e3pruner.search.problem import SearchProblem
from e3pruner.search.protocol import Search, lowest


def bi(problem: SearchProblem) -> Search:
    """BI_l = 1 − E cos(h_l, h_{l+1}), the lowest go (ShortGPT, arXiv 2403.03853). One dense pass a batch, no head."""
    batches = problem.batches
    problem.expect(len(batches))
    influence = [0.0] * problem.num_layers
    for number, batch in enumerate(batches):
        weight = batch.numel() / problem.tokens
        influence = [a + weight * b for a, b in zip(influence, problem.block_influence(number), strict=True)]
    removed = lowest(influence, problem.free, problem.drop)
    yield {"importance": influence, "removed": removed}
    return removed
