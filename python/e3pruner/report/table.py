"""The before/after table, as text cells: the demo prints it, the page shows it, the README holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any


def count(value: float) -> str:
    """A large number with its unit: 134.5 M."""
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return str(value)


def figure(value: float) -> str:
    """Three significant digits; whole numbers up to a million as they are."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"


def plural(count: int, thing: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


# key of a model's figures -> (heading, how it is written)
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "layers": ("layers", str),
    "parameters": ("parameters", count),
    "kl": ("held-out KL", "{:.3f}".format),
    "perplexity": ("perplexity", "{:.2f}".format),
    "top1_agreement": ("top-1 agreement", "{:.1%}".format),
    "unseen_kl": ("unseen kind: KL", "{:.3f}".format),
    "unseen_perplexity": ("perplexity there", "{:.2f}".format),
    "decode_tokens_per_s": ("decode tokens/s", "{:.1f}".format),
    "prefill_tokens_per_s": ("prefill tokens/s", "{:.0f}".format),
}


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Text cells as a Markdown table: the first column to the left, the figures to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(key: str, value: float | None) -> str:
    """One figure as text; a dash where it was not measured."""
    return "–" if value is None else COLUMNS[key][1](value)


def _cell_of(key: str, row: dict[str, Any]) -> str:
    """A model's figure, with the quartiles of a speed."""
    quartiles = row.get(f"{key.removesuffix('_tokens_per_s')}_quartiles")
    spread = ""
    if quartiles and row.get(key) is not None:
        spread = f" ({cell(key, quartiles[0])}–{cell(key, quartiles[1])})"
    return cell(key, row.get(key)) + spread


def model_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: each of `models`, and behind the pruned one the rivals' masks of the same run.

    Columns that no model has a figure for are left out.
    """
    rivals = [{"name": f"pruned by {m['method']}", **m} for m in results.get("methods", [])[1:]]
    rows = [
        row for model in results.get("models", []) for row in (model, *(rivals if model["name"] == "pruned" else []))
    ]
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    headings = ["model", *(COLUMNS[key][0] for key in columns)]
    return headings, [[row["name"], *(_cell_of(key, row) for key in columns)] for row in rows]


def tiles(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(label, figure, what it is compared with) of the page's head: the last model against the first."""
    models = results.get("models", [])
    if len(models) < 2:
        return []
    first, last = models[0], models[-1]
    keys = ("layers", "parameters", "perplexity", "top1_agreement")
    chosen = [
        (COLUMNS[key][0], cell(key, last[key]), f"{cell(key, first[key])} before")
        for key in keys
        if first.get(key) is not None and last.get(key) is not None
    ]
    before, after = (model.get("decode_tokens_per_s") for model in (first, last))
    if before and after:
        chosen.append(("decode speed", f"{after / before:.2f}×", f"{after:.1f} tokens/s, {before:.1f} before"))
    return chosen
