"""Writes the rows of a run as JSON lines and prints them as a table: pytest bench --benchmark-only [--jsonl PATH]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from e3kernels.backends import native_isa
from e3pruner.report.benchmarks import complete, merge, read, table, write
from e3pruner.report.environment import describe_environment


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--jsonl",
        type=Path,
        help="write one JSON line a case here, and the table beside it as .md; rows of other cases stay as they are",
    )


def _row(entry: Any) -> dict[str, Any]:
    stats = entry.stats
    times = sorted(stats.data)
    at = lambda share: times[min(len(times) - 1, round(share * (len(times) - 1)))]  # noqa: E731
    return dict(entry.extra_info) | {"median": stats.median, "p20": at(0.2), "p80": at(0.8), "rounds": len(times)}


def pytest_sessionfinish(session: pytest.Session) -> None:
    benchmarks = getattr(session.config, "_benchmarksession", None)
    if benchmarks is None or not benchmarks.benchmarks:
        return
    rows = [_row(entry) for entry in benchmarks.benchmarks if "op" in entry.extra_info]
    rows = complete(rows, describe_environment() | {"isa": native_isa()})
    print(f"\n{table(rows)}")
    path = session.config.getoption("--jsonl")
    if path is not None:
        write(path, merge(read(path), rows) if path.exists() else rows)
