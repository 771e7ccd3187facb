"""The report's plots: one function a plot, results in, matplotlib figure out."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from e3pruner.report import comparison_plots
from e3pruner.report.palette import COLOURS, DASHES, MARKERS, SERIES, as_text
from e3pruner.storage import replacing_file

Results = dict[str, Any]


@contextmanager
def style(name: str) -> Iterator[None]:
    settings: Any = {
        "axes.edgecolor": COLOURS.muted,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.labelcolor": COLOURS.muted,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "figure.facecolor": COLOURS.surface,
        "font.size": 10,
        "grid.color": COLOURS.grid,
        "legend.frameon": False,
        "legend.labelcolor": COLOURS.ink,
        "lines.linewidth": 2,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.color": COLOURS.ink,
        "xtick.color": COLOURS.muted,
        "ytick.color": COLOURS.muted,
        "ytick.left": False,
    }
    with mpl.rc_context(settings):
        yield


def importance(results: Results) -> Figure:
    """Mean KL of removing each layer alone, on a logarithmic axis; the layers that the search removed stand out."""
    values = np.asarray(results["importance"], dtype=float)
    removed = set(results.get("removed", []))
    figure = Figure(figsize=(8.4, 3.1))
    axes = figure.subplots()
    positive = values[values > 0]
    floor = positive.min() * 0.5 if positive.size else 1e-6
    for index, value in enumerate(np.maximum(values, floor)):
        colour = COLOURS.removed if index in removed else COLOURS.series1
        axes.bar(index, value - floor, bottom=floor, width=0.72, color=colour)
    axes.set(yscale="log", xlabel="layer", ylabel="KL when removed alone (nats)", xlim=(-0.7, len(values) - 0.3))
    axes.set_xticks(range(0, len(values), max(1, len(values) // 15)))
    axes.grid(axis="x", visible=False)
    handles = [mpl.patches.Patch(color=c) for c in (COLOURS.series1, COLOURS.removed)]
    axes.legend(handles, ["kept", "removed by the search"], ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def mask_path(results: Results) -> Figure:
    """Steps x layers: the share of a step's sampled masks that leave the layer out."""
    path = results["mask_path"]
    share = np.asarray(path["removed"], dtype=float).T
    layers, columns = share.shape
    figure = Figure(figsize=(8.4, 0.9 + 0.115 * layers))
    axes = figure.subplots()
    for layer in range(layers):
        out = [run for run in runs(share[layer]) if run[2] > 0]
        bars = [(start, stop - start) for start, stop, _ in out]
        axes.broken_barh(bars, (layer - 0.44, 0.88), facecolor=[(COLOURS.removed, value) for *_, value in out])
    positions = np.unique(np.linspace(0, columns - 1, min(columns, 9)).round().astype(int))
    axes.set_xticks(positions + 0.5, [str(path["steps"][i]) for i in positions])
    axes.set(xlabel="search step", ylabel="layer", xlim=(0, columns), ylim=(layers - 0.4, -0.6))
    axes.set_yticks(range(0, layers, max(1, layers // 10)))
    axes.grid(axis="x", visible=False)
    return figure


def runs(row: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """(start, stop, value) of each stretch of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(row)) + 1), len(row)]
    for start, stop in pairwise(edges):
        yield int(start), int(stop), float(row[start])


def curve(results: Results) -> Figure:
    """Held-out KL against the number of layers removed, one line per method."""
    figure = Figure(figsize=(8.4, 3.4))
    axes = figure.subplots()
    for number, (method, points) in enumerate(results["curve"].items()):
        count, kl = zip(*points, strict=True)
        look = {"color": getattr(COLOURS, SERIES[number % 4]), "ls": DASHES[number % 4], "marker": MARKERS[number % 4]}
        axes.plot(count, kl, label=as_text(method), markersize=5, **look)
    axes.set(xlabel="layers removed", ylabel="held-out KL (nats per token)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    axes.legend(loc="upper left")
    return figure


def frontier(results: Results) -> Figure:
    """Perplexity over the dense model's against what is left: decoding speed where it was measured, else parameters."""
    points = results["frontier"]
    fast = all(point.get("decode_tokens_per_s") for point in points)
    across = [point["decode_tokens_per_s"] if fast else point["parameters"] / 1e6 for point in points]
    ratios = [point["ratio"] for point in points]
    figure = Figure(figsize=(8.4, 3.4))
    axes = figure.subplots()
    axes.plot(across, ratios, color=COLOURS.series1, marker="o", markersize=5)
    for x, ratio, point in zip(across, ratios, points, strict=True):
        label = f"{point['drop']} removed" if point["drop"] else "dense"
        axes.annotate(label, (x, ratio), xytext=(6, 4), textcoords="offset points", fontsize=9)
    axes.set(xlabel="decoded tokens/s" if fast else "parameters (millions)", ylabel="perplexity, × the dense model's")
    if max(ratios) > 3 * min(ratios):
        axes.set_yscale("log")
    return figure


def recovery(results: Results) -> Figure:
    """Training loss by step, its running mean, and the held-out KL where it was measured."""
    history = results["recovery"]
    figure = Figure(figsize=(8.4, 3.4))
    axes = figure.subplots()
    if history["train"]:
        steps, loss = map(np.asarray, zip(*history["train"], strict=True))
        axes.plot(steps, loss, color=COLOURS.series3, lw=1, alpha=0.6, label="training loss")
        window = max(1, len(loss) // 8)
        if window > 1:
            mean = np.convolve(loss, np.ones(window) / window, mode="valid")
            axes.plot(steps[window - 1 :], mean, color=COLOURS.series1, label=f"training loss, mean of {window} steps")
    if history["held_out"]:
        axes.plot(*zip(*history["held_out"], strict=True), color=COLOURS.removed, marker="o", label="held-out KL")
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    axes.set(xlabel="training step", ylabel="nats per token")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")
    return figure


PLOTS: dict[str, Callable[[Results], Figure]] = {
    "importance": importance,
    "mask_path": mask_path,
    "curve": curve,
    "frontier": frontier,
    "recovery": recovery,
    "quality": comparison_plots.quality,
    "price": comparison_plots.price,
    "depth": comparison_plots.depth,
}
# When a plot is drawn, where that is not when the results have a part of its name.
WANTED: dict[str, Callable[[Results], bool]] = {
    "quality": lambda results: bool(results.get("comparison")),
    "price": lambda results: bool(results.get("comparison")),
    "depth": comparison_plots.several_depths,
}


def plotted(name: str, results: Results) -> bool:
    """Whether the results have what the plot shows."""
    return bool(WANTED.get(name, lambda results: results.get(name))(results))


def draw_plots(results: Results, folder: Path) -> dict[str, str]:
    """Draws every plot whose results are there: `folder`/NAME.png, and NAME -> inline SVG for the page."""
    return {name: draw(name, results, folder) for name in PLOTS if plotted(name, results)}


def draw(name: str, results: Results, folder: Path) -> str:
    return render(name, lambda: PLOTS[name](results), folder)


def render(name: str, plot: Callable[[], Figure], folder: Path) -> str:
    """Draws `plot()` in the report's style as `folder`/`name`.png; returns it as inline SVG."""
    with style(name):
        figure = plot()
        with replacing_file(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=160)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    return themed(buffer.getvalue())


def themed(svg: str) -> str:
    """The SVG element alone, its colours and font handed to the page's style sheet."""
    svg = svg[svg.index("<svg") :]
    for name, colour in asdict(COLOURS).items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"(font: [^;\"]*?\d+px )[^;\"]+", r"\1var(--sans)", svg)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
