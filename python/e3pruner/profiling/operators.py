"""How long a trace's operators took, less what the profiler itself cost them."""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import torch

from e3kernels.profiling import Timeline, Trace
from e3kernels.profiling.trace import top_level


def operator_seconds(trace: Trace, untraced: float) -> dict[tuple[str, ...], float]:
    """Seconds inside operators by path of ranges, without the operators that only make a view and compute nothing.

    `untraced`: seconds that the same work takes with no profiler. What it took longer is spread evenly over all events,
    and an operator is charged that share for itself and for each one it called.
    """
    timeline = Timeline(trace.ranges)
    outermost = top_level(trace.operators)
    if not outermost:
        return {}
    traced = max(o.end for o in outermost) - outermost[0].start
    events = len(trace.operators) + len(trace.ranges)
    cost = max(0.0, traced - untraced) / events
    total: dict[tuple[str, ...], float] = defaultdict(float)
    called = sorted(operator.start for operator in trace.operators)
    position = 0
    for operator in outermost:
        first = position
        while position < len(called) and called[position] < operator.end:
            position += 1
        if not is_view(operator.name):
            total[timeline.at(operator.start)] += max(0.0, operator.end - operator.start - cost * (position - first))
    return dict(total)


@cache
def is_view(name: str) -> bool:
    """Whether the operator `name` ("aten::t") returns an argument's memory in another shape, unwritten."""
    schemas = torch._C._jit_get_schemas_for_operator(name) if "::" in name else []
    aliases = [result.alias_info for schema in schemas for result in schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
