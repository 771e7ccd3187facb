"""Layers that go by their place alone: what every method that looks must beat."""

from __future__ import annotations

import torch

from e3pruner.mask_search.method import Search, search_method
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import lowest, removed_units, sampled


@search_method("first-n")
def first_n(problem: SearchProblem) -> Search:
    """The first `drop` layers that may go."""
    return _first_of(problem, problem.free)


@search_method("last-n")
def last_n(problem: SearchProblem) -> Search:
    """The last `drop` layers that may go."""
    return _first_of(problem, problem.free[::-1])


@search_method("alternate")
def alternate(problem: SearchProblem) -> Search:
    """Every second layer from the last but one towards the input (Sajjad et al., arXiv 2004.03844); where these are not
    enough, the others in the same order."""
    deepest_first = problem.free[::-1]
    return _first_of(problem, deepest_first[1::2] + deepest_first[::2])


@search_method("symmetric")
def symmetric(problem: SearchProblem) -> Search:
    """As many layers stay at the input as at the output (Sajjad et al., arXiv 2004.03844); of an odd number, one more
    at the input."""
    last = len(problem.free) - problem.drop
    middle = (last + 1) // 2 + (problem.drop - 1) / 2
    return _first_of(problem, sorted(problem.free, key=lambda layer: abs(problem.free.index(layer) - middle)))


@search_method("random", sublayers=True, quotas=True)
def random_subset(problem: SearchProblem) -> Search:
    """`drop` layers drawn uniformly without replacement from those that may go."""
    uniform = torch.zeros(len(problem.free), dtype=torch.float64)
    return _at_once(removed_units(problem, sampled(problem, uniform, 1.0, 0)))


def _first_of(problem: SearchProblem, order: list[int]) -> Search:
    """The first `drop` layers of `order` that may go together."""
    places = [float(order.index(layer)) if layer in order else 0.0 for layer in range(problem.units.count)]
    return _at_once(lowest(problem, places))


def _at_once(removed: list[int]) -> Search:
    yield {"removed": removed}
    return removed
