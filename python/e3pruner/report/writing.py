"""The damage report: what a cut does to free-running text, each figure with its standard error, model beside model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

REQUEST_SPEED = "request speed"
Figure = tuple[float, float]  # the mean, and its standard error: NaN where that is not known


def with_error(figure: Figure | None) -> str:
    """A figure as text; a dash where there is none."""
    if figure is None:
        return "–"
    value, error = figure
    return f"{value:.3g}" if math.isnan(error) else f"{value:.3g} ± {error:.2g}"


def request_speed(
    dense: Mapping[str, Any], other: Mapping[str, Any], dense_rate: float | None, rate: float | None
) -> Figure | None:
    """How many times as fast as the dense model the other answers a request: tokens needed × time per token.

    `dense` and `other` are what `evaluation.writing` found, of which the greedy answers count; the rates are decoded
    tokens per second. None where a rate was not measured, or an answer's length has an interval that holds zero.
    """
    if not dense_rate or not rate:
        return None
    (before, its_error), (tokens, error) = (found["greedy"]["tokens"] for found in (dense, other))
    if its_error >= before or error >= tokens:
        return None
    speed = (before / dense_rate) / (tokens / rate)
    return speed, speed * math.hypot(its_error / before, error / tokens)


def writing_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of `results["writing"]`: a figure per row, a model per column, the dense one first."""
    found: dict[str, dict[str, Any]] = results.get("writing", {})
    if not found:
        return [], []
    first = next(iter(found.values()))
    places: list[tuple[str, tuple[str, ...]]]
    places = [(part, (part, name)) for part in ("greedy", "sampled") for name in first[part]]
    places += [(kind, ("tasks", kind, name)) for kind, scores in first["tasks"].items() for name in scores]
    rows = [
        [f"{label} {path[-1].replace('_', ' ')}", *(with_error(_at(each, path)) for each in found.values())]
        for label, path in places
    ]
    rates = {row["name"]: row.get("decode_tokens_per_s") for row in results.get("models", [])}
    dense, *others = found
    times = [request_speed(first, found[name], rates.get(dense), rates.get(name)) for name in others]
    if any(times):
        rows.append([REQUEST_SPEED, "1", *map(with_error, times)])
    return ["figure", *found], rows


def _at(found: Any, path: tuple[str, ...]) -> Figure | None:
    for key in path:
        found = found.get(key, {})
    return (found[0], found[1]) if found else None
