"""Read the kernels of variants for targets, in one process a core, and hold them against what was recorded."""

import os
import re
import sys
from collections.abc import Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from bench.static.binary import Report, report
from bench.static.capture import TARGETS, launches
from bench.static.variants import launched, ours, peers

Row = dict[str, Any]
Rows = dict[str, dict[str, dict[str, Row]]]  # variant -> kernel -> family -> what the binary says


Pair = tuple[str, str]  # a variant and a family


def _read(name: str, family: str, known: Collection[str]) -> dict[str, Row]:
    """kernel -> what its binary says, of the launches of one variant that are not known."""
    call = {**ours(), **launched(), **peers()}[name]
    return {
        kernel: {**report(launch.binary).row(), "fingerprint": launch.fingerprint}
        for kernel, launch in launches(family, call, known).items()
        if launch.binary is not None
    }


def own_pairs() -> list[Pair]:
    """Our variants for every target, and the launches of every shape for one: they differ in shape alone."""
    return [(name, family) for family in TARGETS for name in ours()] + [(name, "sm_90") for name in launched()]


def measure(pairs: Iterable[Pair], recorded: Rows) -> Rows:
    """What the binaries of the (variant, family) pairs say, of a binary that is recorded what is recorded. The others
    are compiled, each once, one process a core."""
    calls = {**ours(), **launched(), **peers()}
    found = {pair: launches(pair[1], calls[pair[0]], None) for pair in pairs}
    rows = {
        row["fingerprint"]: row
        for kernels in recorded.values()
        for of in kernels.values()
        for row in of.values()
        if row.keys() >= Report.__dataclass_fields__.keys()
    }
    assigned: dict[Pair, set[str]] = {}  # to each pair the binaries that no pair before it has
    seen = set(rows)
    for pair, of in found.items():
        if new := {launch.fingerprint for launch in of.values()} - seen:
            assigned[pair] = new
            seen |= new
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        known = [seen - new for new in assigned.values()]
        results = pool.map(_read, *zip(*assigned, strict=True), known) if assigned else ()
        for pair, read in zip(assigned, results, strict=True):
            rows |= {row["fingerprint"]: row for row in read.values()}
            print(f"{' '.join(pair)}: {', '.join(read)}", file=sys.stderr)
    table: Rows = {}
    for (name, family), of in found.items():
        for kernel, launch in of.items():
            table.setdefault(name, {}).setdefault(kernel, {})[family] = rows[launch.fingerprint]
    return table


def _narrowest(row: Row) -> int:
    return min((int(re.sub(r"\D", "", access)) for access in row["accesses"]), default=0)


def findings(rows: Rows, recorded: Rows) -> list[str]:
    """Each spill, and each kernel that moves more bytes an element, or by narrower accesses, than recorded."""
    found = []
    for name, kernels in rows.items():
        for kernel, families in kernels.items():
            for family, row in families.items():
                where = f"{name} {kernel} {family}"
                if row["spills"]:
                    found.append(f"{where}: {row['spills']} spills")
                before = recorded.get(name, {}).get(kernel, {}).get(family)
                if before is None:
                    found.append(f"{where}: not recorded; run `python -m bench.static`")
                    continue
                moved, allowed = row["bytes_per_element"] or 0, before["bytes_per_element"] or 0
                if moved > allowed:
                    found.append(f"{where}: {moved} bytes an element, recorded {allowed}")
                if _narrowest(row) < _narrowest(before):
                    found.append(f"{where}: accesses of {_narrowest(row)} bits, recorded {_narrowest(before)}")
    return found


def check(names: Collection[str], families: Collection[str], recorded: Rows) -> list[str]:
    """The findings of the named variants, none: of all; of binaries recorded as they are now, what is recorded, and the
    rest is compiled."""
    pairs = [(name, family) for name, family in own_pairs() if family in families and (not names or name in names)]
    return findings(measure(pairs, recorded), recorded)
