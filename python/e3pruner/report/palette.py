"""The report's colours, and how its lines are told apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Palette:
    """The report's colours. In SVG they become the page's CSS variables of these names, so plots follow its theme."""

    ink: str = "#1c2330"
    muted: str = "#667085"
    grid: str = "#e3e7ed"
    surface: str = "#ffffff"
    removed: str = "#d9480f"
    series1: str = "#1d5fbf"
    series2: str = "#b7791f"
    series3: str = "#6b7a90"
    series4: str = "#2f8f6b"


def as_text(name: str) -> str:
    """`name` as matplotlib is to draw it: no formula between dollars, and in the legend even after an underscore."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


COLOURS = Palette()
SERIES = ("series1", "series2", "series3", "series4")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
