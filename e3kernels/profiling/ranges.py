"""Named ranges: the phases and parts that a profile shows, almost free while nobody measures.

`torch.profiler.record_function` costs ten microseconds and more even with no profiler; a `named_range` then costs two
comparisons. The operators of this library need none: the dispatcher reports them to the profiler by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Self

from torch.profiler import record_function

from e3kernels.compat import profiler_is_on

_OFF = nullcontext()
_recorder: RangeRecorder | None = None


class Range(NamedTuple):
    """A stretch of time under a name; seconds on one clock."""

    name: str
    start: float
    end: float


def named_range(name: str) -> AbstractContextManager[object]:
    """The `with` block is a range `name` for whoever measures: a `RangeRecorder`, else torch.profiler, else nobody."""
    if _recorder is not None:
        return _Recorded(_recorder, name)
    if profiler_is_on():
        return record_function(name)
    return _OFF


class RangeRecorder:
    """Collects the named ranges of a `with` block by the wall clock: about a microsecond each, where the profiler
    slows every operator down.

    `ranges` are those that have ended, in the order of their ends; `open` are the names of those that have not,
    outermost first. `synchronize`, if given, is called before the clock is read: an accelerator's work then counts
    where it was launched. Raises RuntimeError where another recorder is active.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self.ranges: list[Range] = []
        self.open: list[str] = []
        self.synchronize = synchronize

    def __enter__(self) -> Self:
        global _recorder
        if _recorder is not None:
            raise RuntimeError("a RangeRecorder is active already; one at a time")
        _recorder = self
        return self

    def __exit__(self, *error: object) -> None:
        global _recorder
        _recorder = None


class _Recorded:
    __slots__ = ("name", "recorder", "start")

    def __init__(self, recorder: RangeRecorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def __enter__(self) -> None:
        self.recorder.open.append(self.name)
        self.start = self._now()

    def __exit__(self, *error: object) -> None:
        end = self._now()
        self.recorder.open.pop()
        self.recorder.ranges.append(Range(self.name, self.start, end))

    def _now(self) -> float:
        if self.recorder.synchronize is not None:
            self.recorder.synchronize()
        return time.perf_counter()
