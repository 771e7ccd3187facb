"""Find the decoder layers that a language model misses least: several search methods under one protocol."""

from e3pruner.mask_search.search import METHODS, search

__all__ = ["METHODS", "search"]
