"""Programs that a command starts, and that end with it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from contextlib import suppress

import psutil

PATIENCE = 10.0  # seconds that a child has to end in order


def run_child(command: Sequence[str]) -> int:
    """The exit code of a program, whose input and output are ours. What it has started ends with this block, too."""
    with subprocess.Popen(command) as child:
        try:
            return child.wait()
        except BaseException:
            end(psutil.Process(child.pid))
            raise


def end(process: psutil.Process) -> None:
    """Asks a process and all that it started to end, and kills what does not."""
    family = [process, *process.children(recursive=True)]
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.terminate()
    _, stubborn = psutil.wait_procs(family, timeout=PATIENCE)
    for each in stubborn:
        with suppress(psutil.NoSuchProcess):
            each.kill()
