"""Times in rounds, and what they know of themselves: on recorded seconds and clocks that do not run by themselves."""

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import NamedTuple

import psutil
import pytest

from e3pruner import timing
from e3pruner.timing import Conditions, Estimate, Timed, in_turns, watched


def test_actions_take_turns_in_changing_order():
    calls = []
    actions = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}
    results = in_turns(actions, 5)
    turns = [calls[start : start + 3] for start in range(0, 18, 3)]
    assert all(sorted(turn) == list("abc") for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert results == {name: [3 * n + turn.index(name) + 1 for n, turn in enumerate(turns) if n] for name in "abc"}


@pytest.fixture
def clock(monkeypatch):
    """A clock that ticks a second whenever it is read for a limit."""
    now = iter(range(1000))
    monkeypatch.setattr(timing, "time", SimpleNamespace(monotonic=lambda: next(now), perf_counter=lambda: 0.0))


@pytest.mark.parametrize(
    ("given", "rounds"),
    [
        ({}, 3),  # no time for more
        ({"limit": 100, "settled": lambda results: len(results["a"]) >= 7}, 7),
        ({"limit": 100, "settled": lambda results: False, "most": 5}, 5),
        ({"limit": 10, "settled": lambda results: False}, 12),  # the clock is read before each round beyond the third
        ({"limit": 100, "most": 1}, 3),  # as many as were asked for
    ],
)
def test_rounds_go_on_until_they_agree_or_the_time_is_up(clock, given, rounds):
    assert len(in_turns({"a": lambda: 1.0, "b": lambda: 2.0}, 3, **given)["a"]) == rounds


def test_an_estimate_knows_how_far_it_can_be_trusted():
    calm = Estimate.of_times([1.00, 1.01, 1.02, 1.01, 1.00, 1.02, 1.01, 1.00, 1.01])
    busy = Estimate.of_times([1.0, 1.9, 1.1, 2.3, 1.0])
    assert calm.settled
    assert not busy.settled
    assert busy == Estimate(pytest.approx(3.1 / 3), 1.0, 1.9, 5)
    assert busy.margin == pytest.approx(1.57 * 0.9 / 5**0.5)
    assert not Estimate.of_times([1.0, 1.0]).settled  # two rounds say nothing of each other


def test_the_interval_of_a_difference_may_hold_nonsense():
    assert Estimate.of_differences([0.3, 0.31, 0.29, 0.3, 0.3]).between(0, 1)
    assert not Estimate.of_differences([0.3, -0.4, 0.9, 0.1, -1.1]).between(0, 1)
    assert Estimate.of_differences([3.0, -1.0, 2.0]).value == 2


def test_short_calls_are_made_in_a_row_and_the_loop_is_taken_off(monkeypatch):
    """A call takes 50 µs, the empty one 10: by a clock that only calls move."""
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(timing, "_nothing", lambda: now.__setitem__(0, now[0] + 10e-6))
    timed = Timed(lambda: now.__setitem__(0, now[0] + 50e-6))
    assert timed.repeats == 20
    assert timed() == pytest.approx(40e-6)


def test_a_machine_that_others_use_is_said_to_be_in_use(monkeypatch):
    """Ten seconds, in which all processors worked 17 and this program 4."""
    values = {"monotonic": iter([0.0, 10.0]), "busy": iter([100.0, 117.0]), "own": iter([5.0, 9.0])}
    monkeypatch.setattr(timing, "time", SimpleNamespace(monotonic=lambda: next(values["monotonic"])))
    monkeypatch.setattr(timing, "_busy", lambda: next(values["busy"]))
    monkeypatch.setattr(timing, "_own", lambda: next(values["own"]))
    monkeypatch.setattr(psutil, "getloadavg", lambda: (3.1, 2.0, 1.0))
    monkeypatch.setattr(psutil, "cpu_freq", lambda: None)
    with watched() as conditions:
        pass
    assert conditions.others == pytest.approx(1.3)
    conditions.cores = 2
    (doubt,) = conditions.doubts()
    assert doubt == "other programs kept 1.3 of 2 cores busy (load average 3.1): stop them"
    sentence = "Meanwhile the load average was 3.1, other programs had 1.3 of 2 cores."
    assert conditions.row() == {
        "sentence": sentence, "seconds": 10.0, "load_average": [3.1, 3.1], "cores_of_others": 1.3, "mhz": None
    }  # fmt: skip


def test_two_busy_programs_are_seen():
    """Real ones: whoever measures beside them is told."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        with watched() as conditions:
            time.sleep(0.4)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert any("other programs kept" in doubt for doubt in conditions.doubts())


def test_only_the_processors_of_this_program_count(monkeypatch):
    """On a machine of many, what others do on the rest of them disturbs nobody here."""
    idle, working = SimpleCpu(0.0, 100.0), SimpleCpu(60.0, 40.0)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [working, idle, working, working])
    monkeypatch.setattr(timing, "_cores", lambda: {1, 2})
    assert timing._busy() == 60


class SimpleCpu(NamedTuple):
    user: float
    idle: float


@pytest.mark.parametrize(
    ("conditions", "doubts"),
    [
        (Conditions(others=0.09, cores=2), 0),
        (Conditions(others=0.4, cores=64), 0),
        (Conditions(others=2.0, cores=64), 1),  # the threads of a run wait for the slowest of them
        (Conditions(mhz=(3000.0, 2950.0)), 0),
        (Conditions(mhz=(3000.0, 2400.0)), 1),
    ],
)
def test_what_of_a_machine_is_doubted(conditions, doubts):
    assert len(conditions.doubts()) == doubts


def test_a_time_whose_interval_holds_none_is_not_known():
    """±215 % of itself, on a busy machine, was printed as a number with its share of a ceiling."""
    assert Estimate(1.0, 0.9, 1.7, 5).known
    assert not Estimate(1.0, 0.9, 3.9, 5).known
    assert Estimate(1.0, 1.0, 1.0, 1).known
