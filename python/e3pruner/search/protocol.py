"""What a search method is, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from e3pruner.search.problem import SearchProblem

Search = Generator[dict[str, Any], None, list[int]]
"""A running search: yields one record a step, returns the layers to remove.

Every record holds "removed", the best mask known after that step, as layer indices. "importance" is one value a layer,
"score" a mean KL a token in nats, "removed_share" for each layer the share of the step's masks that lack it.
"""

Method = Callable[..., Search]
"""`method(problem, *, option=default, ...)`: checks its options at once or in its first step, then searches."""


def lowest(values: Sequence[float], layers: Sequence[int], count: int) -> list[int]:
    """The `count` of `layers` with the lowest values, ascending; of equal values the deeper layer comes first."""
    return sorted(sorted(layers, key=lambda layer: (values[layer], -layer))[:count])


def leave_one_out_scores(problem: SearchProblem, batches: Sequence[int]) -> list[float]:
    """I_l: the mean KL without layer l alone, for every layer, over the batches with these numbers."""
    masks = [problem.mask([layer]) for layer in range(problem.num_layers)]
    return problem.score(masks, batches)
