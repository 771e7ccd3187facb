"""A profile as files: one self-contained HTML page with its plots as PNG beside it, JSON lines, terminal tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from e3pruner.report.html import write_html
from e3pruner.report.plots import render
from e3pruner.storage import write_json_lines

PAGE_FILE = "profile.html"
ROWS_FILE = "profile.jsonl"


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
    """A profile to be shown. `rows`: its figures as JSON objects, each with its "kind"."""

    title: str
    summary: str
    sections: list[Section]
    rows: list[dict[str, Any]]


def write_page(page: Page, folder: Path, environment: dict[str, Any], command: str) -> Path:
    """Writes `folder`/profile.html, profile.jsonl and each plot as PNG; returns the page's path.

    `environment` is that of `e3pruner.report.describe_environment`; `command` is how the profile came about.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"kind": "run", "title": page.title, "command": command, **environment}, *page.rows]
    write_json_lines(folder / ROWS_FILE, rows)
    return write_html(
        folder / PAGE_FILE,
        "profile.html.jinja",
        {name: render(name, plot, folder) for section in page.sections for name, plot in section.plots.items()},
        title=page.title,
        summary=page.summary,
        command=command,
        environment=environment,
        sections=page.sections,
    )


def figures(values: Iterable[float | None], digits: int = 3) -> list[str]:
    """Numbers as a table shows them; "–" for None."""
    return [
        "–" if value is None else f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}" for value in values
    ]


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def plural(count: int, thing: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
