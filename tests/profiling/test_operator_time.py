"""How long operators took, without the profiler's own cost."""

import pytest

from e3kernels.profiling import Range, Trace
from e3pruner.profiling.operators import is_view, operator_seconds


@pytest.mark.parametrize(
    ("name", "view"),
    [("aten::t", True), ("aten::view", True), ("aten::mm", False), ("aten::copy_", False), ("x", False)],
)
def test_views_compute_nothing(name, view):
    assert is_view(name) == view


def test_the_profilers_cost_is_taken_off_every_event():
    """Twelve seconds traced, seven untraced, five events: one second each; the outer operator called one other."""
    operators = [
        Range("aten::mm", 0, 6),
        Range("aten::addmm", 1, 3),
        Range("aten::t", 7, 8),
        Range("aten::mul", 10, 12),
    ]
    trace = Trace([Range("ffn", 0, 9)], operators, [])
    assert operator_seconds(trace, untraced=7) == {("ffn",): 6 - 2, (): 2 - 1}


def test_a_trace_without_operators():
    assert operator_seconds(Trace([], [], []), 1.0) == {}
