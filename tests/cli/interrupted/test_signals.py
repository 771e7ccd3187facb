"""SIGTERM, as a scheduler sends it: what is done is kept, the exit code says so, and no child is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from e3pruner.cli.command import terminable
from e3pruner.recovery.interrupt import deferred_interrupt

PROGRAM = "from e3pruner.cli import app; app()"


def terminated(arguments: list[Any], ready: Callable[[psutil.Process], bool]) -> tuple[int, str, list[psutil.Process]]:
    """Exit code and stderr of `e3`, which gets SIGTERM once it is `ready`, and what children it had then."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment) as e3:
        process = psutil.Process(e3.pid)
        while e3.poll() is None and not ready(process):
            time.sleep(0.02)
        children = process.children(recursive=True) if e3.poll() is None else []
        e3.send_signal(signal.SIGTERM)
        assert e3.stderr
        errors = e3.stderr.read()
    return e3.returncode, errors, children


def test_bench_takes_its_children_with_it(tmp_path: Path) -> None:
    code, errors, children = terminated(
        ["bench", "--out", tmp_path / "out.jsonl"], lambda process: bool(process.children(recursive=True))
    )
    assert children
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        child.kill()
    assert not alive
    assert code == 143, errors
    assert "e3 bench: terminated" in errors


def test_a_training_puts_off_sigterm_as_it_does_ctrl_c() -> None:
    with terminable() as came, deferred_interrupt() as wanted:
        os.kill(os.getpid(), signal.SIGTERM)
        assert wanted()
        assert came == [signal.SIGTERM]


def test_sigterm_counts_where_ctrl_c_is_ignored() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), terminable():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_terminated_run_goes_on(model_folder: Path, text_file: Path, tmp_path: Path, e3: Any) -> None:
    options = ["--steps", 4000, "--held-out", 1, "--length", 16, "--batch", 1, "--recover", "save_every=1"]
    arguments = ["distill", "--model", model_folder, "--teacher", model_folder, "--text", text_file, *options]
    state = tmp_path / "out.partial" / "training" / "state.json"
    code, errors, _ = terminated([*arguments, "--out", tmp_path / "out"], lambda process: state.exists())
    assert code == 143, errors
    assert "the same command goes on" in errors
    assert state.exists()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.lock").exists()
