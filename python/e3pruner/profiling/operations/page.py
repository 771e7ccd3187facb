"""The page of the operations' profile."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from e3pruner.profiling import plots
from e3pruner.profiling.operations.profile import OperationsProfile
from e3pruner.profiling.page import Page, Section, Table, figures, percent


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
            *figures([1e3 * row.seconds, 1e6 * row.host, row.rate / 1e9]),
            f"G{row.unit}/s",
            percent(row.share),
            *("–" if row.errors is None else f"{error:.0e}" for error in row.errors or (None, None)),
        ]
        for row in profile.rows
    ]
    headings = ["operation", "ms", "host µs", "rate", "", "of the ceiling", "value error", "gradient error"]
    note = (
        "Value and gradient together. Host: the same call on the smallest tensors, where only Python, dispatcher and "
        "autograd are left. The ceiling of the linear losses is the matrix product, that of all others a copy."
    )
    bars = {f"{r.operation}, {r.dtype}, {r.provider}": r.share for r in profile.rows}
    sections = [
        Section(
            "What this machine can do", "Measured before anything else.", [Table("Ceilings", ["", "", ""], limits)], {}
        ),
        Section("Operations", note, [Table("", headings, rows)], {"operations": partial(plots.share_bars, bars)}),
    ]
    summary = "Every operation with every provider that serves here, against the limits of the machine."
    found = [{"kind": "operation", **asdict(row)} for row in profile.rows]
    return Page(title, summary, sections, found + ceilings.rows())
