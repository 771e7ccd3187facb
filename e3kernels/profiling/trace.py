"""A Chrome trace of torch.profiler, read back: its named ranges, operators and allocations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from e3kernels.profiling.ranges import Range

# What torch itself names in every trainer, as far as the sign before its details.
_OF_TORCH = {
    "ProfilerStep": "step",
    "Optimizer.step": "optimizer",
    "Optimizer.zero_grad": "zero_grad",
    "enumerate(DataLoader)": "data",
}
_AUTOGRAD = "autograd::engine::evaluate_function"


class Allocation(NamedTuple):
    """Memory taken (`size` > 0) or given back (< 0), in bytes, of the block at `address` on `device`."""

    time: float
    size: int
    address: tuple[int, int]


@dataclass(frozen=True)
class Trace:
    """What a profiler recorded; times in seconds on its clock. Operators nest as they called each other."""

    ranges: list[Range]
    operators: list[Range]
    allocations: list[Allocation]

    @classmethod
    def read(cls, path: Path) -> Trace:
        """The trace in the JSON file `path`, as `torch.profiler.profile.export_chrome_trace` writes it.

        Raises ValueError for a file that is no such trace.
        """
        try:
            events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a Chrome trace of torch.profiler: {error!r}") from error
        ranges = [_range(e) for e in events if e.get("cat") == "user_annotation" and e["name"] != "PyTorch Profiler"]
        operators = [_range(e) for e in events if e.get("cat") == "cpu_op"]
        allocations = [_allocation(e) for e in events if e.get("name") == "[memory]"]
        return cls(ranges, operators, sorted(allocations, key=lambda a: a.time))

    def phases(self) -> list[Range]:
        """The ranges, with those that a trainer of somebody else's does not name: "step", "optimizer", "zero_grad" and
        "data" where torch does it, "backward" for each run of the autograd engine outside a range "backward".
        """
        named = [Range(_OF_TORCH.get(name.partition("#")[0], name), *times) for name, *times in self.ranges]
        known = [r for r in named if r.name == "backward"]
        return named + [run for run in self._autograd_runs() if not any(_overlap(run, other) for other in known)]

    def _autograd_runs(self) -> list[Range]:
        """Runs of the engine: nodes it evaluated with no operator of the caller's between them."""
        runs: list[Range] = []
        nodes = sorted((o for o in self.operators if o.name.startswith(_AUTOGRAD)), key=lambda o: o.start)
        others = sorted(o.start for o in top_level(self.operators) if not o.name.startswith(_AUTOGRAD))
        position = 0
        for node in nodes:
            while position < len(others) and others[position] < node.start:
                position += 1
            apart = position > 0 and runs and others[position - 1] > runs[-1].end
            if not runs or apart:
                runs.append(Range("backward", node.start, node.end))
            else:
                runs[-1] = Range("backward", runs[-1].start, max(runs[-1].end, node.end))
        return runs


def top_level(operators: list[Range]) -> list[Range]:
    """The operators that no other operator called, by their start."""
    outermost: list[Range] = []
    for operator in sorted(operators, key=lambda o: (o.start, -o.end)):
        if not outermost or operator.start >= outermost[-1].end:
            outermost.append(operator)
    return outermost


def _overlap(a: Range, b: Range) -> bool:
    return a.start < b.end and b.start < a.end


def _range(event: dict[str, Any]) -> Range:
    start = event["ts"] * 1e-6
    return Range(event["name"], start, start + event["dur"] * 1e-6)


def _allocation(event: dict[str, Any]) -> Allocation:
    facts = event["args"]
    return Allocation(event["ts"] * 1e-6, facts["Bytes"], (facts["Device Id"], facts["Addr"]))
