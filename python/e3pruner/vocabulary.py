"""Names and values that a user gives: checked against what is known, with the nearest known name in the error."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """ "; did you mean 'steps'?", or nothing where no known name is near `name`."""
    near = get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_integer(name: str, value: int, least: int) -> None:
    """Raises `ValueError` unless `value` is an integer from `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer from {least}")


def check_positive(name: str, value: float) -> None:
    """Raises `ValueError` unless `value` is finite and above 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r} must be finite and above 0")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raises `ValueError` unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}{did_you_mean(value, known)}")


def check_options(what: str, options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Checks keyword arguments against the keyword-only parameters of `function`, before it is called.

    Raises `TypeError` that begins with `what` and names the first option that `function` does not have, or whose value
    is not of the annotated type. An integer may stand for a float; a truth value is no number.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    hints = get_type_hints(inspect.unwrap(function))
    for name, value in options.items():
        if name not in known:
            there = ", ".join(known) or "none"
            raise TypeError(f"{name} is no option of {what}{did_you_mean(name, known)}; it has {there}")
        if not _fits(value, hints.get(name, Any)):
            raise TypeError(f"{name}={value!r} is no {_said(hints[name])}, which {what} needs")


def _fits(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str)  # which words are legal, the function itself says
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(each, get_args(kind)[0]) for each in value)
    return isinstance(value, get_origin(kind) or kind)


def _said(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_said(each) for each in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {_said(get_args(kind)[0])}"
    names = {int: "integer", float: "number", str: "text", bool: "truth value", type(None): "null", dict: "mapping"}
    kind = get_origin(kind) or kind
    return "text" if kind is Literal else names.get(kind, getattr(kind, "__name__", str(kind)))
