"""The profile's plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from e3kernels.profiling import MemoryTimeline
from e3kernels.profiling.memory import CATEGORIES
from e3pruner.profiling.ceilings import Ceilings
from e3pruner.report.palette import COLOURS, MARKERS, as_text
from e3pruner.timing import Estimate

FILLS = (
    COLOURS.series1,
    COLOURS.series2,
    COLOURS.series4,
    COLOURS.removed,
    COLOURS.series3,
    COLOURS.muted,
    COLOURS.grid,
)


def layer_bars(
    parts: dict[str, list[float]], python: list[float], spreads: list[Estimate | None], title: str
) -> Figure:
    """Milliseconds of every layer, its parts on top of each other; a mark shows how much of it is Python, a line the
    quartiles of the layer's rounds.
    """
    figure = Figure(figsize=(8.4, 3.1))
    axes = figure.subplots()
    layers = np.arange(len(python))
    floor = np.zeros(len(layers))
    for (part, seconds), colour in zip(parts.items(), FILLS, strict=False):
        axes.bar(layers, 1e3 * np.asarray(seconds), 0.72, floor, color=colour, label=part)
        floor += 1e3 * np.asarray(seconds)
    axes.plot(layers, 1e3 * np.asarray(python), "_", color=COLOURS.ink, ms=11, mew=2, label="of it outside operators")
    for layer, estimate in enumerate(spreads):
        if estimate is not None:
            quartiles = [1e3 * estimate.low, 1e3 * estimate.high]
            axes.plot([layer, layer], quartiles, color=COLOURS.ink, lw=1, label="quartiles" if layer == 0 else None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="layer", ylabel=f"ms, {title}", xlim=(-0.7, len(layers) - 0.3))
    axes.grid(axis="x", visible=False)
    highest = max([floor.max(), *(1e3 * e.high for e in spreads if e is not None)])
    axes.set_ylim(top=1.35 * highest)
    axes.legend(loc="upper left", ncols=6, fontsize=9, handlelength=1, columnspacing=1)
    return figure


class Point(NamedTuple):
    """Something under the roofline: FLOPs, bytes and seconds."""

    label: str
    series: str
    flops: float
    bytes: float
    seconds: float


def roofline(points: list[Point], ceilings: Ceilings, dtype: str) -> Figure:
    """GFLOP/s over FLOPs a byte, below the read bandwidth and the matrix product in `dtype`."""
    figure = Figure(figsize=(8.4, 3.8))
    axes = figure.subplots()
    drawn = [p for p in points if min(p.flops, p.bytes, p.seconds) > 0]
    intensity = [p.flops / p.bytes for p in drawn] or [1.0]
    x = np.geomspace(min(*intensity, 0.5) / 2, max(*intensity, 100.0) * 3, 200)
    top = ceilings.gemm[dtype]
    axes.plot(x, np.minimum(x * ceilings.read, top) / 1e9, color=COLOURS.ink, label=f"read, matrix product {dtype}")
    for number, series in enumerate(dict.fromkeys(p.series for p in drawn)):
        mine = [p for p in drawn if p.series == series]
        xs, ys = [p.flops / p.bytes for p in mine], [p.flops / p.seconds / 1e9 for p in mine]
        axes.plot(xs, ys, MARKERS[number % 4], color=FILLS[number], ms=6, ls="none", label=series)
    # Neighbours have their names on different sides of their marks.
    for place, p in enumerate(sorted(drawn, key=lambda p: p.flops / p.seconds)):
        at, (side, offset) = (p.flops / p.bytes, p.flops / p.seconds / 1e9), (("left", 6), ("right", -6))[place % 2]
        look: Any = {"textcoords": "offset points", "fontsize": 8, "color": COLOURS.muted, "ha": side, "va": "center"}
        axes.annotate(p.label, at, (offset, 0), **look)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s")
    axes.legend(loc="lower right", fontsize=9)
    return figure


def memory_timeline(memory: MemoryTimeline) -> Figure:
    """MiB held by category over time; what was there before is at the bottom."""
    figure = Figure(figsize=(8.4, 3.3))
    axes = figure.subplots()
    points = memory.thinned(2000).points
    seconds = np.array([time for time, _ in points]) - points[0][0]
    series = {n: [(h.get(n, 0) + memory.before.get(n, 0)) / 2**20 for _, h in points] for n in CATEGORIES}
    shown = {name: values for name, values in series.items() if max(values) > 0}
    colours = dict(
        zip(
            CATEGORIES,
            (COLOURS.grid, COLOURS.series3, COLOURS.series4, *FILLS[:2], COLOURS.removed, COLOURS.muted),
            strict=True,
        )
    )
    axes.stackplot(
        1e3 * seconds, *shown.values(), labels=shown, colors=[colours[n] for n in shown], step="post", linewidth=0
    )
    axes.set(xlabel="ms", ylabel="MiB", xlim=(0, 1e3 * seconds[-1]))
    axes.set_ylim(top=1.25 * max(map(sum, zip(*shown.values(), strict=True))))
    axes.legend(loc="upper left", ncols=6, fontsize=9, handlelength=1, columnspacing=1)
    return figure


def removal_curve(
    predicted: dict[str, list[float]], measured: dict[str, dict[int, tuple[float, tuple[float, float]]]]
) -> Figure:
    """Speed-up over layers removed, predicted as lines and measured as marks with their quartiles, for each engine and
    phase.
    """
    figure = Figure(figsize=(8.4, 3.4))
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys((*predicted, *measured))):
        colour, values = FILLS[number % 4], predicted.get(name, [])
        axes.plot(range(len(values)), values, color=colour, label=name if values else f"{name} (measured)")
        for removed, (times, quartiles) in measured.get(name, {}).items():
            axes.plot([removed, removed], quartiles, color=colour, lw=1)
            axes.plot(removed, times, MARKERS[number % 4], color=colour, ms=6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="layers removed", ylabel="times as fast", xlim=(0, None))
    if predicted or measured:
        axes.legend(loc="upper left")
    return figure


def phase_bars(phases: dict[str, dict[str, float]], spreads: Mapping[str, Estimate] | None = None) -> Figure:
    """One horizontal bar per run, its phases one after the other, in ms; a line: the quartiles of its rounds."""
    figure = Figure(figsize=(8.4, 0.9 + 0.55 * len(phases)))
    axes = figure.subplots()
    names = list(dict.fromkeys(name for run in phases.values() for name in run))
    for row, run in enumerate(phases.values()):
        left = 0.0
        for name, seconds in run.items():
            axes.barh(row, 1e3 * seconds, 0.6, left, color=FILLS[names.index(name) % len(FILLS)])
            left += 1e3 * seconds
    for row, name in enumerate(phases):
        if estimate := (spreads or {}).get(name):
            axes.plot([1e3 * estimate.low, 1e3 * estimate.high], [row, row], color=COLOURS.ink, lw=1)
    axes.set_yticks(range(len(phases)), list(map(as_text, phases)))
    axes.invert_yaxis()
    axes.set(xlabel="ms")
    axes.grid(axis="y", visible=False)
    handles = [axes.barh(0, 0, color=FILLS[i % len(FILLS)], label=as_text(name)) for i, name in enumerate(names)]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.1, 1), ncols=7, fontsize=9, handlelength=1)
    return figure


def share_bars(shares: dict[tuple[str, str], tuple[float, tuple[float, float]]]) -> Figure:
    """One horizontal bar per operation and provider: its share of the ceiling that bounds it, and the quartiles."""
    figure = Figure(figsize=(8.4, 1.0 + 0.24 * len(shares)))
    axes = figure.subplots()
    providers = list(dict.fromkeys(provider for _, provider in shares))
    for row, ((_, provider), (share, quartiles)) in enumerate(shares.items()):
        axes.barh(row, 100 * share, 0.7, color=FILLS[providers.index(provider)])
        axes.plot([100 * edge for edge in quartiles], [row, row], color=COLOURS.ink, lw=1)
    axes.set_yticks(range(len(shares)), [name for name, _ in shares], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="% of the ceiling")
    axes.grid(axis="y", visible=False)
    handles = [Patch(color=FILLS[number], label=name) for number, name in enumerate(providers)]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=9, handlelength=1)
    return figure
