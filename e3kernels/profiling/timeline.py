"""Which ranges were open when, from ranges that nest."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable

from e3kernels.profiling.ranges import Range

Path = tuple[str, ...]  # names of open ranges, outermost first


class Timeline:
    """The nested `ranges` as a sequence of moments at which the innermost open range changes."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        self._times: list[float] = []
        self._paths: list[Path] = []
        stack: list[Range] = []
        for current in sorted(ranges, key=lambda r: (r.start, -r.end)):
            self._close(stack, current.start)
            stack.append(current)
            self._change(current.start, stack)
        self._close(stack, float("inf"))

    def at(self, time: float) -> Path:
        """The ranges that are open at `time`; empty outside all of them."""
        index = bisect_right(self._times, time) - 1
        return self._paths[index] if index >= 0 else ()

    def seconds(self) -> dict[Path, float]:
        """For every path the time spent in its innermost range itself, outside the ranges within."""
        total: dict[Path, float] = defaultdict(float)
        for start, end, path in zip(self._times, self._times[1:], self._paths, strict=False):
            total[path] += end - start
        total.pop((), None)
        return dict(total)

    def _close(self, stack: list[Range], time: float) -> None:
        while stack and stack[-1].end <= time:
            end = stack.pop().end
            self._change(end, stack)

    def _change(self, time: float, stack: list[Range]) -> None:
        self._times.append(time)
        self._paths.append(tuple(entry.name for entry in stack))
