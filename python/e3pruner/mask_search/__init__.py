"""Find the decoder layers that a language model misses least: several search methods under one protocol."""

from e3pruner.mask_search.method import METHODS, Method, search_method
from e3pruner.mask_search.search import search

if search.__doc__:  # which python -OO strips
    search.__doc__ += f"\n    Methods, their options and defaults:\n\n{METHODS.described()}\n"

__all__ = ["METHODS", "Method", "search", "search_method"]
