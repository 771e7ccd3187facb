"""The plots of `e3 compare`: how good, at what price, at which depth."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from e3pruner.report.comparison import Spread, panels
from e3pruner.report.palette import COLOURS, DASHES, MARKERS, SERIES, as_text

_PRICE_MARKERS = (*MARKERS, "v", "P", "X", "*")


def quality(results: dict[str, Any]) -> Figure:
    """Held-out KL of every method, a panel for each number of removed layers: mean, and the spread over the seeds."""
    parts = panels(results)
    longest = max(len(lines) for _, lines in parts)
    figure = Figure(figsize=(8.4, (0.5 + 0.24 * longest) * len(parts) + 0.4))
    for axes, (caption, lines) in zip(figure.subplots(len(parts), squeeze=False)[:, 0], parts, strict=True):
        for place, line in enumerate(lines):
            spread = Spread(*line["kl"])
            colour = COLOURS.removed if place == 0 else COLOURS.series1
            axes.plot([spread.low, spread.high], [place, place], color=colour)
            axes.plot(spread.mean, place, "o", color=colour, markersize=5)
        axes.set_yticks(range(len(lines)), [as_text(line["method"]) for line in lines])
        axes.set(ylim=(len(lines) - 0.4, -0.6))
        axes.set_title(as_text(caption), loc="left")
        axes.grid(axis="y", visible=False)
        _logarithmic(axes, "x", [line["kl"][0] for line in lines])
    axes.set_xlabel("held-out KL (nats per token)")
    return figure


def price(results: dict[str, Any]) -> Figure:
    """Held-out KL against the cost of the search, a mark for each method."""
    parts = panels(results)
    methods = list(dict.fromkeys(line["method"] for _, lines in parts for line in lines))
    figure = Figure(figsize=(8.4, 3.2 * len(parts) + 0.03 * len(methods)))
    for axes, (caption, lines) in zip(figure.subplots(len(parts), squeeze=False)[:, 0], parts, strict=True):
        free = min((line["cost"] for line in lines if line["cost"]), default=1.0) / 10  # where those stand that cost 0
        for line in lines:
            number = methods.index(line["method"])
            colour, marker = getattr(COLOURS, SERIES[number % 4]), _PRICE_MARKERS[number // 4 % 8]
            spread = Spread(*line["kl"])
            # Of equal values the mean may be rounded past them.
            bar = [[max(0.0, spread.mean - spread.low)], [max(0.0, spread.high - spread.mean)]]
            look = {"color": colour, "marker": marker, "ls": "", "label": as_text(line["method"])}
            axes.errorbar(line["cost"] or free, spread.mean, yerr=bar, **look)
        axes.set(xscale="log", ylabel="held-out KL (nats per token)")
        axes.set_title(as_text(caption), loc="left")
        _logarithmic(axes, "y", [line["kl"][0] for line in lines])
    axes.set_xlabel("tokens × dense forward passes")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return figure


def several_depths(results: dict[str, Any]) -> bool:
    """Whether models of different depth are compared."""
    return len({line["drop"] for line in results.get("comparison", [])}) > 1


def depth(results: dict[str, Any]) -> Figure:
    """Held-out KL against the number of removed layers, a line for each method and recovery, spread as a band."""
    figure = Figure(figsize=(8.4, 4.2))
    axes: Axes = figure.subplots()
    lines = results["comparison"]
    for number, name in enumerate(dict.fromkeys((line["method"], line["recovery"]) for line in lines)):
        points = [(line["drop"], Spread(*line["kl"])) for line in lines if (line["method"], line["recovery"]) == name]
        drops = [drop for drop, _ in points]
        colour = getattr(COLOURS, SERIES[number % 4])
        label = name[0] if name[1] == "none" else f"{name[0]}, {name[1]}"
        look = {"color": colour, "ls": DASHES[number // 4 % 4], "marker": MARKERS[number % 4], "markersize": 4}
        axes.plot(drops, [spread.mean for _, spread in points], label=as_text(label), **look)
        low, high = ([getattr(spread, name) for _, spread in points] for name in ("low", "high"))
        axes.fill_between(drops, low, high, color=colour, alpha=0.15, lw=0)
    axes.set(xlabel="layers removed", ylabel="held-out KL (nats per token)")
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    _logarithmic(axes, "y", [line["kl"][0] for line in lines])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return figure


def _logarithmic(axes: Axes, letter: str, values: list[float]) -> None:
    """A logarithmic axis where the values span more than a factor of three, with plain numbers at its marks."""
    if min(values) <= 0 or max(values) < 3 * min(values):
        return
    axes.set(**{f"{letter}scale": "log"})
    axis = getattr(axes, f"{letter}axis")
    axis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(mpl.ticker.NullFormatter())
