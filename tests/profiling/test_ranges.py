"""Named ranges and what is made of them: timelines, traces, memory."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import e3kernels as e3k
from e3kernels.profiling import MemoryTimeline, Range, RangeRecorder, Timeline, Trace, named_range
from e3kernels.profiling.trace import Allocation, top_level


def test_nobody_measures_nobody_pays():
    assert named_range("a") is named_range("b")


def test_a_recorder_sees_ranges_nest():
    with RangeRecorder() as recorder, named_range("outer"):
        with named_range("inner"):
            assert recorder.open == ["outer", "inner"]
        assert recorder.open == ["outer"]
    assert [r.name for r in recorder.ranges] == ["inner", "outer"]
    inner, outer = recorder.ranges
    assert outer.start <= inner.start <= inner.end <= outer.end
    assert named_range("a") is named_range("b")


def test_one_recorder_at_a_time():
    with RangeRecorder(), pytest.raises(RuntimeError, match="one at a time"), RangeRecorder():
        pass


def test_an_error_ends_its_ranges():
    with RangeRecorder() as recorder, pytest.raises(KeyError), named_range("outer"), named_range("inner"):
        raise KeyError
    assert recorder.open == []
    assert [r.name for r in recorder.ranges] == ["inner", "outer"]


def test_self_times_leave_out_what_is_inside():
    ranges = [Range("b", 1, 3), Range("c", 2, 3), Range("a", 0, 10), Range("b", 5, 6)]
    timeline = Timeline(ranges)
    assert timeline.seconds() == {("a",): 7, ("a", "b"): 2, ("a", "b", "c"): 1}
    assert timeline.at(2.5) == ("a", "b", "c")
    assert timeline.at(4) == ("a",)
    assert timeline.at(-1) == timeline.at(11) == ()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_self_times_add_up(depths):
    """Ranges built by opening and closing at whole seconds: no second is lost and none is counted twice."""
    ranges, opened = [], []
    for time, depth in enumerate([*depths, 0]):
        while len(opened) > depth:
            ranges.append(Range("r", opened.pop(), time))
        while len(opened) < depth:
            opened.append(time)
    outermost = top_level(ranges)
    assert sum(Timeline(ranges).seconds().values()) == sum(r.end - r.start for r in outermost)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiled")
    weight = torch.randn(64, 32, requires_grad=True)
    with e3k.profile(folder) as found:
        with named_range("student forward"):
            logits = torch.randn(8, 32) @ weight.T
        with named_range("loss"):
            loss = e3k.entropy_kl(logits, torch.randn(8, 64))
        loss.backward()
        e3k.gumbel_topk(torch.randn(12), 4)
    return found, folder


def test_every_operation_is_a_range_of_the_trace(profiled):
    operators = {operator.name for operator in profiled[0].trace.operators}
    assert {"e3::entropy_kl", "e3::gumbel_topk", "aten::mm"} <= operators


def test_the_trace_names_its_phases(profiled):
    found, folder = profiled
    assert {r.name for r in found.trace.ranges} == {"student forward", "loss"}
    assert [r.name for r in found.trace.phases()].count("backward") == 1
    rows = [json.loads(line) for line in (folder / "ranges.jsonl").read_text().splitlines()]
    assert {tuple(row["path"]) for row in rows} == set(found.seconds())
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]


def test_gradients_are_what_outlives_the_backward_pass(profiled):
    found, _ = profiled
    last = found.memory.points[-1][1]
    assert last["gradients"] == 64 * 32 * 4 + 4  # the weight's, and the loss itself
    assert found.memory.peak()["activations"] >= 8 * 64 * 4


def test_memory_counts_only_what_it_saw_allocated():
    gave_back = Allocation(1.0, -100, (0, 7))
    taken = [Allocation(2.0, 50, (0, 7)), Allocation(3.0, 20, (0, 8)), Allocation(4.0, -50, (0, 7))]
    memory = MemoryTimeline.of(Trace([Range("prefill", 1.5, 5)], [], [gave_back, *taken]), {"weights": 1000})
    assert memory.peak() == {"weights": 1000, "activations": 70}
    assert [sum(held.values()) for _, held in memory.points] == [50, 70, 20]


def test_only_what_is_there_before_the_work_begins_is_weights():
    """A forward pass outside every range used to count as weights, and so did a step's data and clipping."""
    taken = [Allocation(float(time), 10, (0, time)) for time in range(1, 6)]
    step = [Range("step", 2.5, 4.5), Range("loss", 3.5, 4.5)]
    held = MemoryTimeline.of(Trace(step, [], taken)).peak()
    assert held == {"weights": 20, "activations": 10, "logits": 10, "other": 10}
    assert MemoryTimeline.of(Trace([], [], taken)).peak() == {"other": 50}


def test_a_thinned_timeline_keeps_its_peak():
    """One moment of thousands holds the most: drawing every tenth used to lose it."""
    points = [(float(time), {"activations": 10**9 if time == 4321 else time}) for time in range(9000)]
    memory = MemoryTimeline(points)
    thin = memory.thinned(1000)
    assert len(thin.points) <= 1000
    assert thin.peak() == memory.peak()
    assert (thin.points[0], thin.points[-1]) == (points[0], points[-1])
    assert [time for time, _ in thin.points] == sorted(time for time, _ in thin.points)
    assert memory.thinned(9000).points == points


def test_what_is_no_trace_is_refused(tmp_path):
    (tmp_path / "trace.json").write_text("[]")
    with pytest.raises(ValueError, match=r"trace\.json is not a Chrome trace"):
        Trace.read(tmp_path / "trace.json")


def test_a_profile_is_not_written_over_a_file(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(FileExistsError), e3k.profile(tmp_path / "taken"):
        pytest.fail("the block ran")


def test_a_profile_is_not_written_over_another(tmp_path):
    with e3k.profile(tmp_path):
        torch.ones(3)
    before = (tmp_path / "trace.json").read_bytes()
    with pytest.raises(FileExistsError, match="holds a profile"), e3k.profile(tmp_path):
        pytest.fail("the block ran")
    assert (tmp_path / "trace.json").read_bytes() == before
    with e3k.profile(tmp_path, force=True) as again:
        torch.ones(3) @ torch.ones(3)
    assert "aten::dot" in {operator.name for operator in again.trace.operators}


def test_nothing_is_written_before_the_block_ends(tmp_path):
    with e3k.profile(tmp_path / "new"):
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "trace.json").exists()


NESTED = """
import torch, e3kernels
def outer():
    return {}
with outer() as found:
    torch.ones(3).mul(2)
    try:
        with e3kernels.profile():
            print("the inner block ran")
    except RuntimeError as error:
        print(error)
    torch.ones(3).exp()
events = found.trace.operators if hasattr(found, "trace") else found.events()
print({{"aten::mul", "aten::exp"}} <= {{event.name for event in events}})
"""


@pytest.mark.parametrize("outer", ["e3kernels.profile()", "torch.profiler.profile()"])
def test_a_profile_inside_another_is_refused_and_the_outer_one_is_whole(outer):
    """In a process of its own: it used to end with SIGSEGV, or with an outer profile that was empty."""
    done = subprocess.run([sys.executable, "-c", NESTED.format(outer)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a profiler is at work already" in done.stdout
    assert done.stdout.splitlines()[-1] == "True"


def test_a_trace_carries_the_shapes(profiled):
    events = json.loads((profiled[1] / "trace.json").read_text())["traceEvents"]
    (product,) = [
        e for e in events if e.get("name") == "aten::mm" and e["args"].get("Input Dims") == [[8, 32], [32, 64]]
    ]
    assert product["args"]["Input type"] == ["float", "float"]
