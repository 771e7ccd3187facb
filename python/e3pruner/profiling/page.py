"""A profile as files: one self-contained HTML page with its plots as PNG beside it, JSON lines, terminal tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from e3pruner.report.plots import render
from e3pruner.storage import replacing_file

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
    drawn = {name: Markup(render(name, plot, folder)) for s in page.sections for name, plot in s.plots.items()}
    loader = ChoiceLoader([PackageLoader("e3pruner.profiling", "."), PackageLoader("e3pruner.report", ".")])
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = jinja.get_template("page.html.jinja").render(
        page=page, plots=drawn, environment=environment, command=command
    )
    rows = [{"kind": "run", "title": page.title, "command": command, **environment}, *page.rows]
    _write(folder / PAGE_FILE, text)
    _write(folder / ROWS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
    return folder / PAGE_FILE


def _write(path: Path, text: str) -> None:
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def figures(values: Iterable[float | None], digits: int = 3) -> list[str]:
    """Numbers as a table shows them; "–" for None."""
    return [
        "–" if value is None else f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}" for value in values
    ]


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"
