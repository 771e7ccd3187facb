"""Read the kernels of variants for targets, in one process a core, and hold them against what was recorded."""

import os
import re
import sys
from collections.abc import Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from bench.static.binary import report
from bench.static.capture import launches
from bench.static.variants import ours, peers

Row = dict[str, Any]
Rows = dict[str, dict[str, dict[str, Row]]]  # variant -> kernel -> family -> what the binary says


def _read(name: str, family: str, known: Collection[str]) -> dict[str, Row]:
    """kernel -> what its binary says, of the launches of one variant that are not known."""
    call = {**ours(), **peers()}[name]
    return {
        kernel: {**report(launch.binary).row(), "fingerprint": launch.fingerprint}
        for kernel, launch in launches(family, call, known).items()
        if launch.binary is not None
    }


def measure(pairs: Iterable[tuple[str, str]], known: Collection[str] = ()) -> Rows:
    """Compile the (variant, family) pairs, one process a core."""
    rows: Rows = {}
    names, families = zip(*pairs, strict=True)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        results = pool.map(_read, names, families, [known] * len(names))
        for name, family, read in zip(names, families, results, strict=True):
            for kernel, row in read.items():
                rows.setdefault(name, {}).setdefault(kernel, {})[family] = row
            print(f"{name} {family}: {', '.join(read)}", file=sys.stderr)
    return rows


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


def _fingerprints(rows: Rows) -> set[str]:
    return {row["fingerprint"] for kernels in rows.values() for of in kernels.values() for row in of.values()}


def check(names: Iterable[str], families: list[str], recorded: Rows) -> list[str]:
    """The findings of the named variants: of those recorded as they are now, what is recorded; the rest is compiled."""
    known = _fingerprints(recorded)
    calls = ours()
    changed = [
        (name, family)
        for name in names
        for family in families
        if any(launch.fingerprint not in known for launch in launches(family, calls[name], None).values())
    ]
    return findings({name: recorded.get(name, {}) for name in names}, recorded) + (
        findings(measure(changed, known), recorded) if changed else []
    )
