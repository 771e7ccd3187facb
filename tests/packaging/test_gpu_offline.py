"""The run on a machine that is lent for half an hour: what was known when it was cut off is there."""

import json
import os
import sys

import pytest
import torch

from bench.gpu import __main__ as figures
from bench.gpu import offline


@pytest.fixture
def rows(tmp_path, monkeypatch):
    target = tmp_path / "rows.jsonl"
    monkeypatch.setenv("E3_ROWS", str(target))
    return lambda: [json.loads(line) for line in target.read_text().splitlines()]


def run(stage, seconds=60):
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not of these tests
    offline.run(stage, seconds, own | {"PYTHONPATH": str(offline.ROOT)})


def test_a_stage_that_is_cut_off_keeps_its_rows(rows):
    code = "from bench.gpu import rows; rows.append(a=1); print('said', flush=True); import time; time.sleep(600)"
    run(offline.Stage("slow", (sys.executable, "-c", code), 3))
    first, last = rows()
    assert first == {"stage": "slow", "a": 1}
    assert last["ended"] == "cut off"
    assert last["said"] == "said\n"


def test_a_tool_that_is_not_there_is_a_row(rows):
    run(offline.Stage("sanitizer", ("no-such-tool", "x"), 3))
    assert rows() == [{"stage": "sanitizer", "ended": "not there", "why": "no-such-tool is not on the path"}]


def test_every_test_is_a_row_with_its_reason(rows, tmp_path):
    file = tmp_path / "test_two.py"
    tests = ("def test_good(): pass", "def test_bad(): assert 0, 'why not'", "@pytest.mark.skip\ndef test_no(): pass")
    file.write_text("\n".join(("import pytest", *tests)))
    run(offline.Stage("tests", (*offline.PYTEST, "--rootdir", str(tmp_path), str(file)), 60))
    outcomes = {row["test"].split("::")[1]: row for row in rows() if "test" in row}
    assert {name: row["outcome"] for name, row in outcomes.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_no": "skipped",
    }
    assert "why not" in outcomes["test_bad"]["why"]
    summary = offline.summary(tmp_path / "rows.jsonl")
    assert "tests: 1 after" in summary
    assert "test_bad" in summary


@pytest.mark.parametrize("error", [ImportError("No module named 'trl'"), AttributeError("moved"), TypeError("renamed")])
def test_a_peer_that_cannot_run_has_no_time_and_a_reason(error):
    def step():
        raise error

    assert figures._measure(step, torch.device("cpu")) == {"ms": None, "why": f"{type(error).__name__}: {error}"}
