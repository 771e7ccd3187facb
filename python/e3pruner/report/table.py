"""The before/after table, as text cells: the demo prints it, the page shows it, the README holds it."""

from __future__ import annotations

from typing import Any

# key of a model's figures -> (heading, format)
COLUMNS = {
    "layers": ("layers", "{:d}"),
    "parameters": ("parameters", "{:.1f} M"),
    "kl": ("held-out KL", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "top1_agreement": ("top-1 agreement", "{:.1%}"),
    "decode_tokens_per_s": ("decode tokens/s", "{:.1f}"),
    "prefill_tokens_per_s": ("prefill tokens/s", "{:.0f}"),
}


def cell(key: str, value: float | None) -> str:
    """One figure as text; a dash where it was not measured."""
    if value is None:
        return "–"
    return COLUMNS[key][1].format(value / 1e6 if key == "parameters" else value)


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
    return headings, [[row["name"], *(cell(key, row.get(key)) for key in columns)] for row in rows]


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
