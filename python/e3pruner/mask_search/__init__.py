"""Find the decoder layers that a language model misses least: several search methods under one protocol."""

from e3pruner.mask_search.method import METHODS, Method, search_method
from e3pruner.mask_search.search import search

__all__ = ["METHODS", "Method", "search", "search_method"]
