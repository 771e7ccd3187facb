"""Rows of a run, each in the file at once: a run that is cut off keeps what it had.

`append` writes one; as a plugin of pytest (`-p bench.gpu.rows`) it writes every test's outcome. E3_ROWS names the file,
E3_STAGE the part of the run; without E3_ROWS rows are printed.
"""

import json
import os
from typing import Any

import pytest


def append(**row: Any) -> None:
    """One row, as a line of JSON, in one write."""
    line = json.dumps({"stage": os.environ.get("E3_STAGE")} | row) + "\n"
    target = os.environ.get("E3_ROWS")
    if target is None:
        print(line, end="", flush=True)
        return
    with open(target, "ab", buffering=0) as file:
        file.write(line.encode())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext[-600:]
    append(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), why=why or None)
