"""The page of the operations' profile."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from e3pruner.profiling import plots
from e3pruner.profiling.operations.profile import OperationRow, OperationsProfile
from e3pruner.profiling.page import NOT_KNOWN, Page, Section, Table, figures, percent, spread


def operations_page(profile: OperationsProfile, title: str) -> Page:
    """The ceilings, then every operation."""
    ceilings = profile.ceilings
    limits = [
        ["read", *figures([ceilings.read / 1e9]), "GB/s"],
        ["copy, read and written", *figures([ceilings.copy / 1e9]), "GB/s"],
        *([f"matrix product {dtype}", *figures([rate / 1e9]), "GFLOP/s"] for dtype, rate in ceilings.gemm.items()),
        ["dispatcher call", *figures([1e6 * ceilings.dispatch]), "µs"],
    ]
    rows = [
        [
            f"{row.operation}, {row.dtype}, {row.provider}",
            spread(row.estimate),
            NOT_KNOWN if row.host is None else figures([1e6 * row.host])[0],
            figures([row.rate / 1e9])[0] if row.estimate.known else NOT_KNOWN,
            *figures([row.limit / 1e9]),
            f"G{row.unit}/s",
            percent(row.share) if row.estimate.known else NOT_KNOWN,
            *("–" if row.errors is None else f"{error:.0e}" for error in row.errors or (None, None)),
        ]
        for row in profile.rows
    ]
    headings = [
        "operation", "ms (quartiles)", "host µs", "rate", "ceiling", "", "of the ceiling", "value error",
        "gradient error",
    ]  # fmt: skip
    note = (
        "Value and gradient together. Host: the same call on the smallest tensors, where only Python, dispatcher and "
        "autograd are left. The ceiling of the linear losses is the fastest of several matrix products, that of all "
        "others the fastest copy of as many bytes, measured in turns with the operation."
    )
    bars = {
        (f"{r.operation}, {r.dtype}", r.provider): (
            r.share,
            (r.share * r.seconds / r.quartiles[1], r.share * r.seconds / r.quartiles[0]),
        )
        for r in profile.rows
        if r.estimate.known
    }
    sections = [
        Section(
            "What this machine can do",
            "The fastest of several kernels and shapes each, on memory beyond the caches.",
            [Table("Ceilings", ["", "", ""], limits)],
            {},
        ),
        Section("Operations", note, [Table("", headings, rows)], {"operations": partial(plots.share_bars, bars)}),
    ]
    found = [{"kind": "operation", **asdict(row)} for row in profile.rows]
    return Page(title, _headline(profile), sections, found + ceilings.rows(), profile.doubts)


def _headline(profile: OperationsProfile) -> str:
    """How near the fastest provider of each operation comes to what bounds it."""
    best: dict[str, OperationRow] = {}
    for row in (row for row in profile.rows if row.estimate.known):
        name = f"{row.operation} ({row.dtype})"
        if name not in best or row.share > best[name].share:
            best[name] = row
    if not best:
        return "No operation's time is known."
    return "Of its ceiling each operation reaches: " + ", ".join(
        f"{name} {100 * row.share:.3g} % by {row.provider}" for name, row in best.items()
    ) + "."  # fmt: skip
