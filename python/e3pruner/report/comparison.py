"""The cells of `e3 compare`, over their seeds: mean and spread, as lines and as tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from e3pruner.evaluation.paired import Paired, paired
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


def summary(rows: Iterable[dict[str, Any]], reference: str) -> list[Line]:
    """One line for each (number of removed layers, recovery, method), the least held-out KL first within the former.

    Keys: "drop", "recovery", "method", "seeds"; "kl", over all kinds of text, and "kinds", each kind's KL and
    perplexity, as [mean, least, largest] over the seeds; "paired", KL less that of the method `reference` on the same
    sequences, and its standard error (see `paired`), null for itself; "cost" in tokens times dense passes and
    "seconds", means; "removed", the layers of each search, and "agreement", the mean share of the layers of one that
    another of them removes too.

    Where each kind of text is left out once, a seed's rows are one cell, judged on all kinds.
    """
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["drop"], row["recovery"], row["method"]), []).append(row)
    lines = [
        {"drop": drop, "recovery": recovery, "method": method, **_figures(cells)}
        for (drop, recovery, method), cells in groups.items()
    ]
    for line in lines:
        key = line["drop"], line["recovery"], reference
        own = key != (line["drop"], line["recovery"], line["method"]) and key in groups
        difference = paired(_sequences(groups[(*key[:2], line["method"])]), _sequences(groups[key])) if own else None
        line["paired"] = None if difference is None else list(difference)
    return sorted(lines, key=lambda line: (line["drop"], line["recovery"], line["kl"][0]))


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    cells: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(row["seed"], {}).update(row["held_out"])
    kinds = next(iter(cells.values()))
    overall = [math.fsum(cell[kind]["kl"] for kind in kinds) / len(kinds) for cell in cells.values()]
    removed = [row["removed"] for row in rows]
    return {
        "seeds": len(cells),
        "kl": list(Spread.of(overall)),
        "kinds": {
            kind: {
                name: list(Spread.of([cell[kind][name] for cell in cells.values()])) for name in ("kl", "perplexity")
            }
            for kind in kinds
        },
        "cost": math.fsum(row["cost"] for row in rows) / len(rows),
        "seconds": math.fsum(row["seconds"] for row in rows) / len(rows),
        "removed": removed,
        "agreement": agreement(removed),
    }


def agreement(removed: Sequence[Sequence[int]]) -> float | None:
    """How stable a choice is: the mean over pairs of searches of the share of the layers of one that the other removes
    too; None of a single one.
    """
    pairs = list(combinations(map(set, removed), 2))
    return math.fsum(len(a & b) / len(a) for a, b in pairs) / len(pairs) if pairs else None


def _sequences(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """By kind, the KL of each sequence, its mean over the rows."""
    columns: dict[str, list[list[float]]] = {}
    for row in rows:
        for kind, figures in row["held_out"].items():
            columns.setdefault(kind, []).append(figures["sequences"]["kl"])
    return {kind: [math.fsum(each) / len(each) for each in zip(*found, strict=True)] for kind, found in columns.items()}


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
        "kind of text. KL in nats per token; difference: that of the same sequences from the first method's, ± its "
        "standard error; same layers: what two searches of a method agree on; cost in tokens times dense forward "
        "passes; seconds as its measurements took." + _unseen(matrix),
    ]
    for caption, lines in panels(results):
        parts += [f"## {caption}", markdown_table(headings(lines), _rows(lines, results))]
    return "\n\n".join(parts) + "\n"


def _unseen(matrix: dict[str, Any]) -> str:
    if matrix.get("leave_one_out"):
        return " Each kind of text was left out once: what is judged is of a kind that no step saw."
    unseen = ", ".join(matrix.get("unseen", []))
    return f" No step saw text of the kinds {unseen}." if unseen else ""


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
    written = WRITING.values() if _write(lines) else ()
    figures = ["method", "held-out KL", "difference", *by_kind, *written, "cost", "seconds", "same layers"]
    return [*figures, "removed (of searches)"]


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
    difference = "–" if line.get("paired") is None else str(Paired(*line["paired"]))
    same = "–" if line.get("agreement") is None else f"{line['agreement']:.0%}"
    price = f"{line['cost']:,.0f}", figure(round(line["seconds"], 1))
    figures = [line["method"], overall, difference, *by_kind, *written, *price, same]
    return [*figures, _chosen(line.get("removed", []))]


def _chosen(removed: Sequence[Sequence[int]]) -> str:
    """The layers that every search removes, then the others with the number of searches that do, most often first."""
    counts = Counter(layer for layers in removed for layer in layers)
    always = [str(layer) for layer in sorted(counts) if counts[layer] == len(removed)]
    rest = sorted((layer for layer in counts if counts[layer] < len(removed)), key=lambda n: (-counts[n], n))
    return ", ".join([" ".join(always)] * bool(always) + [f"{n} ({counts[n]} of {len(removed)})" for n in rest])


def tables(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The same tables for the page: caption, headings, rows."""
    return [
        {"caption": caption, "headings": headings(lines), "rows": _rows(lines, results)}
        for caption, lines in panels(results)
    ]
