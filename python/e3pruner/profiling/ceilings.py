"""What this machine can do at most, measured: the lines that every other figure is held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

_BYTES = 256 << 20  # beyond most caches
_GEMM = 2048


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second that all threads read, and copy (read and written bytes both counted); FLOPs per second of a
    square matrix product of 2048, by dtype; seconds of a call of the dispatcher that does nothing.
    """

    read: float
    copy: float
    gemm: dict[str, float]
    dispatch: float

    def rows(self) -> list[dict[str, Any]]:
        return [{"kind": "ceilings"} | asdict(self)]


def measure_ceilings(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Ceilings:
    """The ceilings of `device` and the given `dtypes`, in about two seconds."""
    source = torch.ones(_BYTES // 4, device=device)
    target = torch.empty_like(source)
    matrix = source.view(1 << 13, -1)
    vector = torch.ones(matrix.shape[1], device=device)
    # Which of the two reads faster depends on the machine's number of cores.
    read = min(seconds_of(source.sum, device), seconds_of(lambda: matrix @ vector, device))
    copy = seconds_of(lambda: target.copy_(source), device)
    empty = torch.ones(1, device=device)
    alias = torch.ops.aten.alias.default
    dispatch = seconds_of(lambda: [alias(empty) for _ in range(1000)], device) / 1000
    gemm = {str(dtype).removeprefix("torch."): _gemm(device, dtype) for dtype in dtypes}
    return Ceilings(_BYTES / read, 2 * _BYTES / copy, gemm, dispatch)


def _gemm(device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(_GEMM, _GEMM, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * _GEMM**3 / seconds_of(lambda: torch.mm(a, b, out=out), device)


def seconds_of(call: Callable[[], object], device: torch.device, *, budget: float = 0.25) -> float:
    """The median of repeated calls, after one that does not count: `budget` seconds in all, at least three calls."""

    def once() -> float:
        began = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - began

    once()
    times = [once(), once(), once()]
    more = min(1000, int(budget / max(min(times), 1e-9))) - len(times)
    return statistics.median(times + [once() for _ in range(more)])
