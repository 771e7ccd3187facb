"""Checks of arguments that several search methods share."""

from __future__ import annotations

from collections.abc import Sequence

from e3pruner.vocabulary import did_you_mean


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
        raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}{did_you_mean(value, known)}")


def check_drop(drop: int, num_layers: int, num_protected: int = 0) -> None:
    """Raises `TypeError` or `ValueError` unless `drop` of the layers can go, one stays, and the protected ones do."""
    if isinstance(drop, bool) or not isinstance(drop, int):
        raise TypeError(f"drop must be an integer, not {drop!r}")
    if not 1 <= drop < num_layers:
        raise ValueError(f"drop={drop} must be from 1 to {num_layers - 1}: the model has {num_layers} layers")
    if drop > num_layers - num_protected:
        raise ValueError(f"protect names {num_protected} layers, drop={drop} leaves only {num_layers - drop}")
