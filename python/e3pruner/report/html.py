"""The report: one HTML file that needs nothing else, built from a results JSON."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from e3pruner.report.comparison import tables
from e3pruner.report.plots import draw_plots
from e3pruner.report.results import load_results
from e3pruner.report.table import model_table, tiles
from e3pruner.storage import replacing_file

REPORT_FILE = "report.html"


def build_report(folder: Path) -> Path:
    """Reads `folder`/results.json, draws the plots as PNG beside it and writes `folder`/report.html; returns its path.

    Raises what `load_results` raises; nothing is written then.
    """
    results = load_results(folder)
    plots = {name: Markup(svg) for name, svg in draw_plots(results, folder).items()}
    loader = PackageLoader("e3pruner.report", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    headings, rows = model_table(results)
    page = environment.get_template("report.html.jinja").render(
        results=results, plots=plots, headings=headings, rows=rows, tiles=tiles(results), tables=tables(results)
    )
    with replacing_file(folder / REPORT_FILE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / REPORT_FILE
