"""A profile against an earlier one of the same kind: which times changed by more than both scatter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from e3pruner.profiling.page import ROWS_FILE, Page, Section, Table, spread, verdict
from e3pruner.report.table import plural
from e3pruner.storage import read_json_lines
from e3pruner.timing import Estimate

# What tells one time of a profile from the others of its kind.
_NAMES = ("engine", "removed", "step", "losses", "operation", "dtype", "provider", "phase", "part")
_LEAST_OF_MEMORY = 0.01  # which is the same from run to run but for what threads keep

Row = dict[str, Any]


class Change(NamedTuple):
    """A time of both profiles."""

    name: str
    before: Estimate
    now: Estimate

    @property
    def factor(self) -> float:
        return self.now.value / self.before.value

    @property
    def beyond_spread(self) -> bool:
        """Whether both are known, and their intervals of value and margin lie apart."""
        return self.known and abs(self.now.value - self.before.value) > self.now.margin + self.before.margin

    @property
    def known(self) -> bool:
        return self.before.known and self.now.known

    def cells(self) -> list[str]:
        change = f"{100 * (self.factor - 1):+.1f} %" if self.known else "–"
        return [self.name, spread(self.before), spread(self.now), change]

    def row(self) -> Row:
        both = {"before": self.before.value, "now": self.now.value}
        return {"kind": "change", "name": self.name, **both, "beyond_spread": self.beyond_spread}


def read_profile(earlier: Path, kind: str) -> list[Row]:
    """The rows of the profile in the folder, or the JSON lines file, `earlier`.

    Raises FileNotFoundError where there is none, ValueError naming a line that is no row of a profile, and for a
    profile without rows of this `kind`.
    """
    file = earlier / ROWS_FILE if earlier.is_dir() else earlier
    rows = read_json_lines(file, {"kind": str}, "no row of a profile")
    if not any(row["kind"] == kind for row in rows) or rows[0]["kind"] != "run":
        raise ValueError(f"--compare {earlier} is no profile with rows of the kind {kind!r}; name the folder of one")
    return rows


def compared(page: Page, earlier: list[Row]) -> Page:
    """`page` with a section that holds its times against those of an `earlier` profile, and a sentence about it."""
    before, now = times_of(earlier), times_of(page.rows)
    changes = [Change(name, before[name], now[name]) for name in now if name in before]
    moved = sorted((c for c in changes if c.beyond_spread), key=lambda c: -abs(math.log(c.factor)))
    run = earlier[0]
    title, day, source = run.get("title"), str(run.get("date"))[:10], str(run.get("commit"))[:12]
    said = f"Against {title} of {day}: {len(moved)} of {plural(len(changes), 'time')} changed beyond their spread"
    said += f", most {moved[0].name} by {100 * (moved[0].factor - 1):+.1f} %." if moved else "."
    note = (
        f"Commit {source}, {run.get('command')}; it was: {verdict(run.get('doubts', ()))} Changed: by more than the "
        "margins of both, ±1.57 × the distance of the quartiles over √n."
    )
    headings = ["", "ms before (quartiles)", "ms now (quartiles)", "change"]
    memory = [row for row in _memory(earlier, page.rows) if row]
    tables = [Table(f"Changed beyond the spread: {len(moved)}", headings, [change.cells() for change in moved])]
    tables += [Table("Peak of the memory", ["", "MiB before", "MiB now", "change"], memory)] * bool(memory)
    still = [change.cells() for change in changes if not change.beyond_spread]
    tables.append(Table(f"Within the spread: {len(still)}", headings, still))
    doubts = [*page.doubts]
    if title != page.title:
        doubts.append(f"the earlier profile is of something else: {title}")
    if run.get("doubts"):
        doubts.append(f"the earlier profile says of itself that it is not reliable ({len(run['doubts'])} reasons)")
    return page._replace(
        summary=f"{page.summary} {said}",
        sections=[Section("Since the earlier profile", note, tables, {}), *page.sections],
        rows=[*page.rows, *(change.row() for change in changes)],
        doubts=doubts,
    )


def times_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Estimate]:
    """Every time that its row gives with its quartiles, and the ceilings, by a name that both profiles give it."""
    found: dict[str, Estimate] = {}
    for row in rows:
        if row["kind"] == "ceilings":
            found |= {f"ceiling: {name}": Estimate(*values) for name, values in row.get("estimates", {}).items()}
        elif "quartiles" in row:
            name = ", ".join(_called(key, row[key]) for key in _NAMES if row.get(key) is not None)
            seconds = row["seconds"] if "seconds" in row else row["measured"]
            if seconds is not None:
                low, high = row["quartiles"]
                found[name] = Estimate(seconds, low, high, row.get("rounds", 0))
    return found


def _called(key: str, value: Any) -> str:
    return {"removed": f"{value} layers less", "step": f"{value} step", "losses": f"{value} losses"}.get(
        key, str(value)
    )


def _memory(*profiles: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """The peaks of both, step by step, that are not the same."""
    before, now = (
        {
            ", ".join(_called(key, row[key]) for key in _NAMES if row.get(key)) or "the traced run": row["sum"]
            for row in rows
            if row["kind"] == "memory"
        }
        for rows in profiles
    )
    return [
        [name, f"{before[name] / 2**20:.3g}", f"{size / 2**20:.3g}", f"{100 * (size / before[name] - 1):+.1f} %"]
        for name, size in now.items()
        if before.get(name) and abs(size / before[name] - 1) > _LEAST_OF_MEMORY
    ]
