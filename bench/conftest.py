"""Measures the cases one by one, their providers in turns, and writes the rows: pytest bench/ops [--jsonl PATH]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from measure import Turns

from e3kernels.backends import native_isa
from e3pruner.report.benchmarks import complete, merge, read, table, write
from e3pruner.report.environment import describe_environment

TURNS = pytest.StashKey[Turns]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--jsonl",
        type=Path,
        help="write one JSON line a case here, and the table beside it as .md; rows of other cases stay as they are",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TURNS] = Turns()


@pytest.fixture
def turns(pytestconfig: pytest.Config) -> Turns:
    return pytestconfig.stash[TURNS]


def _case(item: Any) -> tuple[object, ...]:
    """What the tests of one case have in common: all but the provider."""
    given = item.callspec.params.items() if hasattr(item, "callspec") else ()
    return item.path, item.originalname, *((name, str(value)) for name, value in given if name != "provider")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The providers of a case one after the other, so that they can take turns; cases in the order they came in."""
    order: dict[tuple[object, ...], int] = {}
    items.sort(key=lambda item: order.setdefault(_case(item), len(order)))


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or _case(nextitem) != _case(item):
        item.config.stash[TURNS].take()


def pytest_sessionfinish(session: pytest.Session) -> None:
    measured = session.config.stash[TURNS].rows
    if not measured:
        return
    rows = complete(measured, describe_environment() | {"isa": native_isa()})
    print(f"\n{table(rows)}")
    path = session.config.getoption("--jsonl")
    if path is not None:
        write(path, merge(read(path), rows) if path.exists() else rows)
