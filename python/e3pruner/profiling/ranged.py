"""Calls of a method as a named range, until an `ExitStack` closes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

from e3kernels.profiling import named_range


def ranged_method(undo: ExitStack, owner: Any, method: str, name: str) -> None:
    """Calls of `owner.method` become ranges `name` until `undo` closes."""
    own = vars(owner).get(method)
    setattr(owner, method, _in_range(name, getattr(owner, method)))
    undo.callback(lambda: delattr(owner, method) if own is None else setattr(owner, method, own))


def _in_range(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with named_range(name):
            return function(*args, **kwargs)

    return ranged
