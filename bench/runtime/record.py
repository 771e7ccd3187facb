"""One JSON line a measurement, with what is needed to repeat it."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "commit": commit,
        "processor": f"{names[0]} x {len(names)}" if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(sys.argv),
    }


class Recorder:
    def __init__(self, path: Path | None) -> None:
        self.path, self.common = path, environment()

    def __call__(self, case: str, provider: str, **values: Any) -> None:
        line = json.dumps({"suite": "runtime", "case": case, "provider": provider} | values | self.common)
        shown = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        )
        print(f"{case:28} {provider:22}", ", ".join(shown), flush=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def seconds_of(*actions: Callable[[], Any], rounds: int) -> list[list[float]]:
    """Seconds of every action in every round; rounds alternate between the actions, so that drift hits all alike."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds):
        for action, mine in zip(actions, times, strict=True):
            began = time.perf_counter()
            action()
            mine.append(time.perf_counter() - began)
    return times


def spread(per_second: list[float]) -> dict[str, float]:
    low, *_, high = statistics.quantiles(per_second, n=5) if len(per_second) > 1 else (per_second[0], per_second[0])
    return {"tokens_per_second": statistics.median(per_second), "p20": low, "p80": high}
