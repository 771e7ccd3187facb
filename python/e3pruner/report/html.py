"""The report: one HTML file that needs nothing else, built from a results JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from e3pruner.report.plots import draw_plots
from e3pruner.report.results import load_results
from e3pruner.storage import replacing_file

REPORT_FILE = "report.html"

# (key in `models`, heading, format, which way is better)
COLUMNS = [
    ("layers", "layers", "{:d}", None),
    ("parameters", "parameters", "{:.1f} M", None),
    ("kl", "held-out KL", "{:.3f}", "low"),
    ("perplexity", "perplexity", "{:.2f}", "low"),
    ("top1_agreement", "top-1 agreement", "{:.1%}", "high"),
    ("decode_tokens_per_s", "decode tokens/s", "{:.1f}", "high"),
    ("prefill_tokens_per_s", "prefill tokens/s", "{:.0f}", "high"),
]


def cell(key: str, value: float | None) -> str:
    """One figure of the before/after table as text; a dash where it was not measured."""
    if value is None:
        return "–"
    form = next(form for name, _, form, _ in COLUMNS if name == key)
    return form.format(value / 1e6 if key == "parameters" else value)


def model_table(models: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the before/after table, without the columns that no model has a figure for."""
    columns = [(key, heading) for key, heading, _, _ in COLUMNS if any(m.get(key) is not None for m in models)]
    rows = [[m["name"], *(cell(key, m.get(key)) for key, _ in columns)] for m in models]
    return ["model", *(heading for _, heading in columns)], rows


def build_report(folder: Path) -> Path:
    """Reads `folder`/results.json, draws the plots as PNG beside it and writes `folder`/report.html; returns its path.

    Raises what `load_results` raises; nothing is written then.
    """
    results = load_results(folder)
    plots = {name: Markup(svg) for name, svg in draw_plots(results, folder).items()}
    page = Environment(
        loader=PackageLoader("e3pruner.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.jinja")
    headings, rows = model_table(results.get("models", []))
    html = page.render(results=results, plots=plots, headings=headings, rows=rows, tiles=tiles(results))
    with replacing_file(folder / REPORT_FILE) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return folder / REPORT_FILE


def tiles(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(label, figure, what it is compared with) of the page's head: the last model against the first."""
    models = results.get("models", [])
    if len(models) < 2:
        return []
    first, last = models[0], models[-1]

    def change(key: str) -> str:
        return f"{cell(key, first.get(key))} before"

    chosen = [(heading, cell(key, last.get(key)), change(key)) for key, heading, _, _ in COLUMNS[:4] if last.get(key)]
    if first.get("decode_tokens_per_s") and last.get("decode_tokens_per_s"):
        speed = last["decode_tokens_per_s"] / first["decode_tokens_per_s"]
        chosen.append(
            ("decode speed", f"{speed:.2f}×", f"{cell('decode_tokens_per_s', last['decode_tokens_per_s'])} tokens/s")
        )
    return chosen
