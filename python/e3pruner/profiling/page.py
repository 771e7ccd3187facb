"""A profile as files: one self-contained HTML page with its plots as PNG beside it, JSON lines, terminal tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from e3pruner.report.html import write_html
from e3pruner.report.plots import render
from e3pruner.report.table import figure, plural
from e3pruner.storage import write_json_lines
from e3pruner.timing import Conditions, Estimate

PAGE_FILE = "profile.html"
ROWS_FILE = "profile.jsonl"
NOT_KNOWN = "not known"  # in place of a figure whose interval holds nonsense


class Table(NamedTuple):
    """Cells as text; the first column names the row."""

    title: str
    headings: list[str]
    rows: list[list[str]]


class Section(NamedTuple):
    """A part of the page: tables, and named plots that are drawn into it."""

    title: str
    note: str
    tables: list[Table]
    plots: Mapping[str, Callable[[], Figure]]


class Page(NamedTuple):
    """A profile to be shown. summary: one sentence with its figure. rows: the figures as JSON objects, each with its
    "kind". doubts: what of them is not reliable, and why.
    """

    title: str
    summary: str
    sections: list[Section]
    rows: list[dict[str, Any]]
    doubts: Sequence[str] = ()


def write_page(
    page: Page, folder: Path, environment: dict[str, Any], command: str, conditions: Conditions | None = None
) -> Path:
    """Writes `folder`/profile.html, profile.jsonl and each plot as PNG; returns the page's path.

    `environment` is that of `e3pruner.report.describe_environment`; `command` is how the profile came about;
    `conditions` are the machine's while it did, whose doubts come first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    doubts = doubts_of(page, conditions)
    meanwhile = {} if conditions is None else {"conditions": conditions.row()}
    run = {"kind": "run", "title": page.title, "command": command, **environment, **meanwhile, "doubts": doubts}
    write_json_lines(folder / ROWS_FILE, [run, *page.rows])
    return write_html(
        folder / PAGE_FILE,
        "profile.html.jinja",
        {name: render(name, plot, folder) for section in page.sections for name, plot in section.plots.items()},
        title=page.title,
        summary=page.summary,
        command=command,
        environment=environment,
        data=ROWS_FILE,
        sections=page.sections,
        doubts=doubts,
        conditions=meanwhile.get("conditions", {}),
    )


def doubts_of(page: Page, conditions: Conditions | None) -> list[str]:
    """What speaks against the whole page, then against its figures."""
    return [*([] if conditions is None else conditions.doubts()), *page.doubts]


def verdict(doubts: Sequence[str]) -> str:
    """The first line of a page and of what is printed."""
    return "Reliable." if not doubts else f"Not reliable: {plural(len(doubts), 'reason')}."


def figures(values: Iterable[float | None]) -> list[str]:
    """Numbers as a table shows them; "–" for None."""
    return ["–" if value is None else figure(value) for value in values]


def spread(estimate: Estimate, unit: float = 1e3) -> str:
    """A time with its quartiles, in ms unless told: "95.1 (94.2–97)"; `NOT_KNOWN` where its interval holds nonsense."""
    if not estimate.known:
        return NOT_KNOWN
    value, low, high = figures([unit * estimate.value, unit * estimate.low, unit * estimate.high])
    return f"{value} ({low}–{high})"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"
