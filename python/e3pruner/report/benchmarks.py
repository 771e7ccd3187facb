"""Benchmark rows: one JSON object a case and provider, how they are compared and shown."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from e3pruner.report.table import plural
from e3pruner.storage import read_json_lines, replacing_file, write_json_lines
from e3pruner.timing import Estimate

Row = dict[str, Any]

# What tells one case from another; rows of a case differ in the provider.
CASE = ("op", "phase", "dtype", "N", "H", "V", "k", "L")
FLOOR = "floor"


class Change(NamedTuple):
    """A row that both runs have: time relative to the floor of its own run, before and after; margin: of their ratio,
    from the scatter of both.
    """

    case: tuple[Any, ...]
    before: float
    after: float
    margin: float = 0.0

    @property
    def factor(self) -> float:
        return self.after / self.before


def case_of(row: Row) -> tuple[Any, ...]:
    """The values that identify a row's case."""
    return tuple(row.get(key) for key in CASE)


def complete(rows: list[Row], environment: dict[str, Any]) -> list[Row]:
    """Rows with rate, share of the ceiling measured in the same run, and where they were measured.

    `rate` is in GB/s or GFLOP/s; `share` is the rate relative to that of the case's floor.
    """
    rated = [row | {"rate": row["work"] / row["median"] / 1e9} for row in rows]
    ceilings = {case_of(row): row["rate"] for row in rated if row["provider"] == FLOOR}
    return [
        row | {"share": row["rate"] / ceilings[case_of(row)] if case_of(row) in ceilings else None} | environment
        for row in rated
    ]


def merge(old: Iterable[Row], new: list[Row]) -> list[Row]:
    """`new`, after the rows of `old` that it does not measure again."""
    measured = {(case_of(row), row["provider"]) for row in new}
    return [row for row in old if (case_of(row), row["provider"]) not in measured] + new


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines to `path` and the table beside it as Markdown."""
    rows = list(rows)
    write_json_lines(path, rows)
    with replacing_file(path.with_suffix(".md")) as temporary:
        temporary.write_text(table(rows) + "\n", encoding="utf-8")


def read(path: Path) -> list[Row]:
    """Rows of a JSON lines file; ValueError names the line that is not one."""
    form = {"op": str, "provider": str, "median": float}
    return read_json_lines(path, form, "not a benchmark row (no op, provider and median)")


def compare(old: list[Row], new: list[Row], provider: str = "e3") -> list[Change]:
    """How `provider` changed on the cases that both runs have, slowest first.

    Times are taken relative to the floor that each run measured, where it did, so that a slower machine is not mistaken
    for slower code.
    """
    before, after = (_relative_times(rows, provider) for rows in (old, new))
    changes = [
        Change(case, before[case][0], after[case][0], before[case][1] + after[case][1])
        for case in before.keys() & after.keys()
    ]
    return sorted(changes, key=lambda change: -change.factor)


def slower(changes: Iterable[Change], limit: float) -> list[Change]:
    """The changes that lost more than `limit` (0.05: 5 %), and more than their margin."""
    return [change for change in changes if change.factor > 1 + max(limit, change.margin)]


def _relative_times(rows: list[Row], provider: str) -> dict[tuple[Any, ...], tuple[float, float]]:
    """Of each case: time relative to its floor, and the margin of that relative to it."""
    floors = {case_of(row): row for row in rows if row["provider"] == FLOOR}
    found = {}
    for row in rows:
        if row["provider"] == provider:
            floor = floors.get(case_of(row))
            time = row["median"] / (floor["median"] if floor else 1.0)
            found[case_of(row)] = time, sum(_margin(each) for each in (row, floor) if each is not None)
    return found


def _margin(row: Row) -> float:
    """Of a time, relative to it; nothing where the row does not tell its quartiles."""
    if "quartiles" not in row:
        return 0.0
    low, high = row["quartiles"]
    return Estimate(row["median"], low, high, row["rounds"]).margin / float(row["median"])


def doubts_of(rows: Iterable[Row]) -> list[str]:
    """What of the rows is not reliable, each reason once."""
    return list(dict.fromkeys(doubt for row in rows for doubt in row.get("doubts", ())))


def _opening(rows: list[Row]) -> list[str]:
    """Whether the rows are reliable, as far as they tell."""
    if doubts := doubts_of(rows):
        return [f"Not reliable, {plural(len(doubts), 'reason')}:", "", *(f"- {doubt}" for doubt in doubts), ""]
    if not all("doubts" in row for row in rows):  # of an earlier version
        return []
    return ["Reliable: every time is known to 2 %, none is below its floor, nothing else was at work.", ""]


def table(rows: list[Row]) -> str:
    """Markdown: what is not reliable; a line per row, cases together, times in ms and relative to floor and ours."""
    spread = "quartiles" if any("quartiles" in row for row in rows) else "p20–p80"
    heading = (
        "case",
        "provider",
        "median ms",
        spread,
        "× floor",
        "× e3",
        "rate",
        "MiB",
        "loss error",
        "grad error",
    )
    lines: list[Iterable[str]] = [heading, ("---",) * len(heading)]
    medians = {(case_of(row), row["provider"]): row["median"] for row in rows}
    for row in sorted(rows, key=lambda row: (str(case_of(row)), row["provider"] != FLOOR, row["median"])):
        case = case_of(row)
        floor, ours = medians.get((case, FLOOR)), medians.get((case, "e3"))
        sizes = ", ".join(f"{key}={row[key]}" for key in CASE[3:] if row.get(key) is not None)
        cells = [f"{row['op']} {row['phase']} {row['dtype']} {sizes}", row["provider"], f"{row['median'] * 1e3:.4g}"]
        cells += ["–".join(f"{1e3 * edge:.4g}" for edge in row.get("quartiles") or (row["p20"], row["p80"]))]
        cells += [_times(row["median"], floor), _times(row["median"], ours), f"{row['rate']:.4g} G{row['unit']}/s"]
        cells += ["–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"]
        cells += ["–" if row[key] is None else f"{row[key]:.1e}" for key in ("loss_error", "grad_error")]
        lines.append(cells)
    return "\n".join([*_opening(rows), *(f"| {' | '.join(line)} |" for line in lines)])


def _times(value: float, reference: float | None) -> str:
    return "–" if reference is None else f"{value / reference:.2f}"
