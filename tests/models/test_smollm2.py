"""The demo's model on a machine that has not made its checkpoint yet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_processes_that_start_together_make_one_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from e3pruner.models import load_smollm2; load_smollm2()"]
    environment = os.environ | {"E3_CACHE": str(tmp_path)}
    together = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(timeout=600) for process in together] == [0, 0]
    assert [folder.name.partition("-")[0] for folder in tmp_path.iterdir()] == ["smollm2"]
