"""kill -9 at random points of the work: the same command goes on to what an uninterrupted run gives, byte for byte."""

import json
import math
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import Command, pipeline_file
from typer.testing import Result

from e3pruner.pipelines.output import output_folder

WORK = output_folder.__wrapped__.__code__  # type: ignore[attr-defined]


def in_child(run: Callable[[], Result], kill_at: float, calls: Path) -> int:
    """Exit status of a forked `run`, killed at call number `kill_at` since it began to write; their number to `calls`.

    Function calls, of Python and C, are a clock that goes the same way every time.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = -1

    def tick(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if count >= 0 or frame.f_code is WORK:
            count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    sys.setprofile(tick)
    done = run()
    sys.setprofile(None)
    calls.write_text(str(count))
    os.write(2, done.output.encode())
    os._exit(done.exit_code)


def result(out: Path) -> dict[str, Any]:
    """All that a run left; of its JSON what does not tell time and place."""
    found: dict[str, Any] = {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*.safetensors")}
    if (out / "manifest.json").exists():
        return found | json.loads((out / "manifest.json").read_text())
    results = json.loads((out / "results.json").read_text())
    return found | {name: results.get(name) for name in ("removed", "recovery", "rounds", "models")}


@pytest.mark.parametrize("command", ["cache-teacher", "distill", "run"])
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_result(
    command: str, kills: int, model_folder: Path, text_file: Path, tmp_path: Path, e3: Command, monkeypatch: Any
) -> None:
    monkeypatch.setattr("e3pruner.recovery.cache.SHARD_TOKENS", 256)
    arguments: list[Any] = ["--text", text_file, "--length", 32, "--batch", 8]
    if command == "run":
        arguments += [pipeline_file(tmp_path, model=str(model_folder), cached=True), "--held-out", 2]
    else:
        arguments += ["--teacher", model_folder]
    if command == "distill":
        arguments += ["--model", model_folder, "--held-out", 2, "--steps", 6, "--option", "save_every=1"]

    def run(out: str) -> Result:
        return e3(command, *arguments, "--out", tmp_path / out)

    assert in_child(lambda: run("whole"), math.inf, tmp_path / "calls") == 0
    expected, calls = result(tmp_path / "whole"), int((tmp_path / "calls").read_text())
    points = random.Random(command)
    for number in range(kills):
        out = f"killed{number}"
        status = in_child(lambda out=out: run(out), points.randrange(calls), tmp_path / "none")
        assert status == -signal.SIGKILL
        if not (tmp_path / out).exists():  # not killed behind the last rename
            # In a child too: what this process imports or remembers no later run does again, and the clock shifts.
            assert in_child(lambda out=out: run(out), math.inf, tmp_path / "none") == 0
        assert result(tmp_path / out) == expected
        assert not (tmp_path / f"{out}.partial").exists()
        assert not list((tmp_path / out).glob(".*"))
