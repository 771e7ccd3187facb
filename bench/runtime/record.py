"""One JSON line a measurement, with what is needed to repeat it, and the table of all lines beside it."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from e3pruner.report.environment import describe_environment
from e3pruner.storage import replacing_file


class Recorder:
    """Appends to `path`, where one is given, so that the cases may be measured in several runs."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.common = describe_environment() | {"command": shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}
        del self.common["backends"]  # those of the operations, which take no part

    def __call__(self, case: str, provider: str, **values: Any) -> None:
        print(f"{case:16} {provider:14} {_shown(values)}", flush=True)
        if self.path is not None:
            row = {"suite": "runtime", "case": case, "provider": provider, "values": values} | self.common
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            _write_table(self.path)


def _shown(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in values.items()
    )


def _write_table(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = ["| case | provider | figures |", "| --- | --- | --- |"]
    lines += [f"| {row['case']} | {row['provider']} | {_shown(row['values'])} |" for row in rows]
    with replacing_file(path.with_suffix(".md")) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


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
