"""Times in rounds, and what they know of themselves: on recorded seconds and clocks that do not run by themselves."""

from types import SimpleNamespace

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
    assert conditions.row() == {"seconds": 10.0, "load_average": [3.1, 3.1], "cores_of_others": 1.3, "mhz": None}


@pytest.mark.parametrize(
    ("conditions", "doubts"),
    [
        (Conditions(others=0.09, cores=2), 0),
        (Conditions(mhz=(3000.0, 2950.0)), 0),
        (Conditions(mhz=(3000.0, 2400.0)), 1),
    ],
)
def test_what_of_a_machine_is_doubted(conditions, doubts):
    assert len(conditions.doubts()) == doubts
