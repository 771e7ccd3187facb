"""The cells of `e3 compare`, over their seeds: mean and spread, as lines and as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from e3pruner.report.table import figure, markdown_table, plural
from e3pruner.report.writing import REQUEST_SPEED, with_error

# What a table says of the text that the first seed's models write.
WRITING = {"loops": "end in a loop", "tokens": "tokens", "right": "tasks right", "request_speed": REQUEST_SPEED}
Line = dict[str, Any]


class Spread(NamedTuple):
    """Over the seeds: the mean, the least and the largest value."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of at least one value."""
        return cls(math.fsum(values) / len(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.low == self.high else f"{self.mean:.3f} ({self.low:.3f}–{self.high:.3f})"


def summary(rows: Iterable[dict[str, Any]]) -> list[Line]:
    """One line for each (number of removed layers, recovery, method), the least held-out KL first within the former.

    Keys: "drop", "recovery", "method", "seeds"; "kl", over all kinds of text, and "kinds", each kind's KL and
    perplexity, as [mean, least, largest] over the seeds; "cost" in tokens times dense passes and "seconds", means;
    "removed", the layers of each seed.
    """
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["drop"], row["recovery"], row["method"]), []).append(row)
    lines = [
        {"drop": drop, "recovery": recovery, "method": method, **_figures(cells)}
        for (drop, recovery, method), cells in groups.items()
    ]
    return sorted(lines, key=lambda line: (line["drop"], line["recovery"], line["kl"][0]))


def _figures(cells: list[dict[str, Any]]) -> dict[str, Any]:
    kinds = cells[0]["held_out"]
    overall = [math.fsum(cell["held_out"][kind]["kl"] for kind in kinds) / len(kinds) for cell in cells]
    return {
        "seeds": len(cells),
        "kl": list(Spread.of(overall)),
        "kinds": {
            kind: {
                name: list(Spread.of([cell["held_out"][kind][name] for cell in cells])) for name in ("kl", "perplexity")
            }
            for kind in kinds
        },
        "cost": math.fsum(cell["cost"] for cell in cells) / len(cells),
        "seconds": math.fsum(cell["seconds"] for cell in cells) / len(cells),
        "removed": [cell["removed"] for cell in cells],
    }


def markdown(results: dict[str, Any]) -> str:
    """The title, where it was measured, and one table for each number of removed layers and recovery."""
    matrix, environment = results["matrix"], results["environment"]
    machine = environment["machine"]
    command = f"`{results['command']}` " if "command" in results else ""
    parts = [
        f"# {results['title']}",
        f"{command}at commit {(environment['commit'] or 'unknown')[:12]}, {machine['processor']}, "
        f"{machine['cores']} cores, torch {environment['versions']['torch']}, transformers "
        f"{environment['versions']['transformers']}, {environment['date'][:10]}.",
        f"Mean (least–largest) over {plural(len(matrix['seeds']), 'seed')}. Calibration: {matrix['sequences']} "
        f"sequences of {matrix['length']} tokens, the same for every method; held out: {matrix['held_out']} of each "
        "kind of text. KL in nats per token; cost in tokens times dense forward passes; seconds as its measurements "
        "took.",
    ]
    for caption, lines in panels(results):
        parts += [f"## {caption}", markdown_table(headings(lines), _rows(lines, results))]
    return "\n\n".join(parts) + "\n"


def panels(results: dict[str, Any]) -> list[tuple[str, list[Line]]]:
    """The lines of `results` for each number of removed layers and recovery, under a caption."""
    groups: dict[str, list[Line]] = {}
    for line in results.get("comparison", []):
        caption = f"{plural(line['drop'], 'layer')} removed" + (
            "" if line["recovery"] == "none" else f", {line['recovery']}"
        )
        groups.setdefault(caption, []).append(line)
    return list(groups.items())


def _rows(lines: list[Line], results: dict[str, Any]) -> list[list[str]]:
    """The lines as text, and below them what the dense model writes."""
    rows, columns = [cells_of(line, _write(lines)) for line in lines], headings(lines)
    if _write(lines) and (of_dense := results.get("dense_writing")):
        dense = {heading: with_error(of_dense[key]) for key, heading in WRITING.items()}
        rows.append(["dense model", *(dense.get(column, "–") for column in columns[1:])])
    return rows


def headings(lines: list[Line]) -> list[str]:
    """Of the cells that `cells_of` gives for the same lines."""
    by_kind = [f"{kind} {name}" for kind in lines[0]["kinds"] for name in ("KL", "perplexity")]
    return ["method", "held-out KL", *by_kind, *(WRITING.values() if _write(lines) else ()), "cost", "seconds"]


def _write(lines: list[Line]) -> bool:
    """Whether there is text of any of them."""
    return any("writing" in line for line in lines)


def cells_of(line: Line, writing: bool = False) -> list[str]:
    """A line as text, `writing` saying whether with the columns of what its model writes."""
    by_kind = [
        text
        for figures in line["kinds"].values()
        for text in (f"{figures['kl'][0]:.3f}", figure(figures["perplexity"][0]))
    ]
    overall = str(Spread(*line["kl"]))
    written = [with_error(line.get("writing", {}).get(key)) for key in WRITING] if writing else []
    return [line["method"], overall, *by_kind, *written, f"{line['cost']:,.0f}", figure(round(line["seconds"], 1))]


def tables(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The same tables for the page: caption, headings, rows."""
    return [
        {"caption": caption, "headings": headings(lines), "rows": _rows(lines, results)}
        for caption, lines in panels(results)
    ]
