"""HTML pages that need nothing else: the report of a run, built from its results, and the page of a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from e3pruner.report.comparison import tables
from e3pruner.report.plots import draw_plots
from e3pruner.report.results import RESULTS_FILE, load_results
from e3pruner.report.table import model_table, tiles
from e3pruner.report.writing import writing_table
from e3pruner.storage import replacing_file

REPORT_FILE = "report.html"


def build_report(folder: Path) -> Path:
    """Reads `folder`/results.json, draws the plots as PNG beside it and writes `folder`/report.html; returns its path.

    Raises what `load_results` raises; nothing is written then.
    """
    results = load_results(folder)
    headings, rows = model_table(results)
    return write_html(
        folder / REPORT_FILE,
        "report.html.jinja",
        draw_plots(results, folder),
        title=results["title"],
        summary=results.get("summary"),
        command=results.get("command"),
        environment=results["environment"],
        data=RESULTS_FILE,
        results=results,
        headings=headings,
        rows=rows,
        tiles=tiles(results),
        tables=tables(results),
        writing=writing_table(results),
    )


def write_html(path: Path, template: str, plots: dict[str, str], **content: Any) -> Path:
    """Fills `template`, an extension of base.html.jinja, with inline SVG `plots` and `content`; returns `path`.

    Every page has a `title`, a `summary` and a `command` (or None), the `environment` that it was made in, and the name
    of its `data`, the file beside it.
    """
    loader = PackageLoader("e3pruner.report", "templates")
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters |= {"shown": shown, "unbroken": unbroken}
    drawn = {name: Markup(svg) for name, svg in plots.items()}
    page = jinja.get_template(template).render(plots=drawn, **content)
    with replacing_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def unbroken(figure: str) -> str:
    """A figure of a table, which may break into lines nowhere but before its spread in brackets; a list as it is."""
    if figure.count(" ") > 3:
        return figure
    return (
        figure.replace(" ", "\N{NO-BREAK SPACE}")
        .replace("\N{NO-BREAK SPACE}(", " (")
        .replace("–", "\N{WORD JOINER}–\N{WORD JOINER}")
    )


def shown(value: Any) -> str:
    """A value of a page's lists of facts as text: three significant digits, and no brackets."""
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(item)}" for name, item in value.items()) or "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
