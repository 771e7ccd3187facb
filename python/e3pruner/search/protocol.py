"""What a search method is, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from torch import Tensor

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


def leave_one_out_scores(problem: SearchProblem, batches: Sequence[int], measure: str = "kl") -> list[float]:
    """I_l: the mean KL without layer l alone, for every layer, over the batches with these numbers."""
    masks = [problem.mask([layer]) for layer in range(problem.num_layers)]
    return problem.score(masks, batches, measure)


def run_starts(problem: SearchProblem) -> list[int]:
    """Where a run of `drop` neighbouring layers that may all go can begin; raises `ValueError` if nowhere."""
    free = set(problem.free)
    starts = [start for start in problem.free if set(range(start, start + problem.drop)) <= free]
    if not starts:
        raise ValueError(f"protect leaves no {problem.drop} neighbouring layers that may all go; protect fewer")
    return starts


def check_integer(name: str, value: int, least: int) -> None:
    """Raises `ValueError` unless `value` is an integer from `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer from {least}")


def check_positive(name: str, value: float) -> None:
    """Raises `ValueError` unless `value` is finite and above 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r} must be finite and above 0")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raises `ValueError` unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")


def check_drop(drop: int, num_layers: int, num_protected: int = 0) -> None:
    """Raises `TypeError` or `ValueError` unless `drop` of the layers can go, one stays, and the protected ones do."""
    if isinstance(drop, bool) or not isinstance(drop, int):
        raise TypeError(f"drop must be an integer, not {drop!r}")
    if not 1 <= drop < num_layers:
        raise ValueError(f"drop={drop} must be from 1 to {num_layers - 1}: the model has {num_layers} layers")
    if drop > num_layers - num_protected:
        raise ValueError(f"protect names {num_protected} layers, drop={drop} leaves only {num_layers - drop}")


def layers_of(problem: SearchProblem, removed: Tensor) -> list[int]:
    """The layers whose entry in `removed`, one for each layer that may go, is not 0."""
    return [layer for layer, gone in zip(problem.free, removed.tolist(), strict=True) if gone]


def removed_share(problem: SearchProblem, removed: Tensor) -> list[float]:
    """For every layer of the model the share of the masks `removed` (N, F) that lack it."""
    share = dict(zip(problem.free, removed.mean(0).tolist(), strict=True))
    return [share.get(layer, 0.0) for layer in range(problem.num_layers)]
