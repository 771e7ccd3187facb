"""Who holds memory when: the allocations of a trace by what they are for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from e3kernels.profiling.timeline import Timeline
from e3kernels.profiling.trace import Trace

CATEGORIES = ("weights", "optimizer", "gradients", "activations", "logits", "cache", "other")

# The innermost of these ranges in which a block was allocated says what it is for.
_BORN_IN = {
    "step": "activations",
    "forward": "activations",
    "optimizer": "optimizer",
    "backward": "activations",
    "loss": "logits",
    "head": "logits",
    "cache": "cache",
    "teacher forward": "activations",
    "student forward": "activations",
    "prefill": "activations",
    "decode": "activations",
}
# Where the work begins: what was allocated before is a copy of weights or data. Outside all ranges else it is unknown.
_WORK = ("step", "prefill")


@dataclass(frozen=True)
class MemoryTimeline:
    """Bytes that tensors held: at each time, for each category what was allocated since the trace began and lives.

    A block born in the loss or in the backward pass that outlives the backward pass is a gradient. `before` are bytes
    that were held when the trace began, by category.
    """

    points: list[tuple[float, dict[str, int]]]
    before: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: Trace, before: Mapping[str, int] | None = None) -> MemoryTimeline:
        phases = trace.phases()
        timeline = Timeline(phases)
        ends = sorted(r.end for r in phases if r.name == "backward")
        began = min((r.start for r in phases if r.name in _WORK), default=float("-inf"))
        freed = _lifetimes(trace)
        held: dict[str, int] = defaultdict(int)
        categories: dict[tuple[int, int], str] = {}
        points = []
        for index, (time, size, address) in enumerate(trace.allocations):
            if size > 0:
                otherwise = "weights" if time < began else "other"
                categories[address] = _category(
                    timeline.at(time), time, freed.get(index, float("inf")), ends, otherwise
                )
            if address in categories:  # what was allocated before the trace began is not known
                held[categories[address]] += size
                points.append((time, dict(held)))
            if size < 0:
                categories.pop(address, None)
        return cls(points, dict(before or {}))

    def peak(self) -> dict[str, int]:
        """Bytes by category, `before` included, at the moment at which most was held in all."""
        most = max((held for _, held in self.points), key=lambda held: sum(held.values()), default={})
        return {c: most.get(c, 0) + self.before.get(c, 0) for c in CATEGORIES if c in most or c in self.before}

    def thinned(self, count: int) -> MemoryTimeline:
        """At most `count` (at least 3) of the points, for drawing: the first, the last, and of each stretch between the
        one at which most was held.
        """
        if len(self.points) <= count:
            return self
        inner, stretches = self.points[1:-1], count - 2
        edges = [len(inner) * i // stretches for i in range(stretches + 1)]
        most = [max(inner[a:b], key=lambda point: sum(point[1].values())) for a, b in pairwise(edges)]
        return MemoryTimeline([self.points[0], *most, self.points[-1]], self.before)


def _category(path: tuple[str, ...], born: float, freed: float, backward_ends: list[float], otherwise: str) -> str:
    if "loss" in path or "backward" in path:
        end = next((end for end in backward_ends if end > born), float("inf"))
        if freed > end:
            return "gradients"
    return next((_BORN_IN[name] for name in reversed(path) if name in _BORN_IN), otherwise)


def _lifetimes(trace: Trace) -> dict[int, float]:
    """For the index of each allocation the time at which it was given back."""
    alive: dict[tuple[int, int], int] = {}
    freed = {}
    for index, allocation in enumerate(trace.allocations):
        if allocation.size > 0:
            alive[allocation.address] = index
        elif allocation.address in alive:
            freed[alive.pop(allocation.address)] = allocation.time
    return freed
