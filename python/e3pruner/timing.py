"""Times that know how sure they are: measured in turns, in rounds, until they agree or the time is up."""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import psutil

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")

# A figure counts as known when its margin is this share of it: less than one layer of thirty, and a fifth of the tenth
# within which parts are held against their whole.
TOLERANCE = 0.02
# More than this share of the cores, or of one core where there are many, taken by others makes no reliable figure: the
# threads of a run wait for the slowest of them.
_OTHERS, _OTHERS_OF_ONE = 0.05, 0.5


class Estimate(NamedTuple):
    """A figure over `rounds`: its value, and the quartiles of the rounds."""

    value: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of_times(cls, seconds: Sequence[float]) -> Estimate:
        """The mean of the faster half: what else a machine does only adds time, and the mean scatters two thirds as
        much as the median of all.
        """
        return cls(statistics.mean(faster_half(seconds, float)), *_quartiles(seconds), len(seconds))

    @classmethod
    def of_differences(cls, values: Sequence[float]) -> Estimate:
        """The median of what each round gave, where disturbances may add to it or take from it."""
        return cls(statistics.median(values), *_quartiles(values), len(values))

    @property
    def margin(self) -> float:
        """Half the width of the interval that holds the median 95 times of 100, 1.57·(q₃ − q₁)/√n (McGill, Tukey and
        Larsen 1978); infinite with fewer than three rounds, which tell nothing of each other.
        """
        return 1.57 * (self.high - self.low) / math.sqrt(self.rounds) if self.rounds > 2 else math.inf

    @property
    def settled(self) -> bool:
        """Whether the margin is within `TOLERANCE` of the value."""
        return self.margin <= TOLERANCE * abs(self.value)

    def between(self, low: float, high: float) -> bool:
        """Whether the whole interval of value and margin lies between the two."""
        return low < self.value - self.margin and self.value + self.margin < high

    @property
    def known(self) -> bool:
        """Whether its interval holds none but times: nothing at or below zero. Two rounds tell nothing against it."""
        return self.rounds <= 2 or self.margin < self.value

    def rate(self, work: float) -> Estimate:
        """Of `work` per second, where this is of the seconds that it took."""
        return Estimate(work / self.value, work / self.high, work / self.low, self.rounds)


def all_settled(seconds: Mapping[Any, Sequence[float]]) -> bool:
    """Whether the times of all rounds tell each action's within `TOLERANCE`."""
    return all(Estimate.of_times(rounds).settled for rounds in seconds.values())


def unsettled(times: Mapping[str, Estimate], remedy: str = "raise --limit") -> list[str]:
    """The times that are known worse than to `TOLERANCE` when the rounds are over, as sentences with the remedy."""
    return [_unsettled(name, estimate, remedy) for name, estimate in times.items() if not estimate.settled]


def _unsettled(name: str, estimate: Estimate, remedy: str) -> str:
    if estimate.rounds <= 2:
        times = "once" if estimate.rounds == 1 else "twice"
        return f"{name} was measured {times}, which tells nothing of its spread: measure more rounds"
    if not estimate.known:
        return f"{name} is not known, after {estimate.rounds} rounds: {remedy}"
    margin = 100 * estimate.margin / estimate.value
    return f"{name} is known to ±{margin:.0f} % only, after {estimate.rounds} rounds: {remedy}"


def faster_half(rounds: Sequence[Result], seconds: Callable[[Result], float]) -> list[Result]:
    """The rounds up to the median."""
    return sorted(rounds, key=seconds)[: (len(rounds) + 1) // 2]


def in_turns(
    actions: Mapping[Name, Callable[[], Result]],
    rounds: int,
    *,
    most: int | None = None,
    limit: float = 0.0,
    settled: Callable[[dict[Name, list[Result]]], bool] = lambda results: True,
) -> dict[Name, list[Result]]:
    """What each action returned in each round, in which all take turns so that drift hits all alike, in an order drawn
    anew, so that none always follows the same other; one round before them does not count.

    `rounds` at least; then more until `settled` says of the results that they will do, `limit` seconds have passed
    since the begin, or there were `most`.
    """
    results: dict[Name, list[Result]] = {name: [] for name in actions}
    order, draw = list(actions), random.Random(0)
    began = time.monotonic()
    done = -1  # the round that does not count
    while done < rounds or (
        (most is None or done < most) and time.monotonic() - began < limit and not settled(results)
    ):
        draw.shuffle(order)
        for name in order:
            found = actions[name]()
            if done >= 0:
                results[name].append(found)
        done += 1
    return results


class Timed:
    """Seconds of one call, the clock's and the loop's own taken off: calls that are too short for the clock are made
    several times in a row, a millisecond or more together.
    """

    def __init__(self, call: Callable[[], object], synchronize: Callable[[], None] | None = None) -> None:
        self.call, self.synchronize = call, synchronize
        call()
        once = max(self._seconds(call, 1), 1e-7)
        self.repeats = max(1, min(10_000, math.ceil(1e-3 / once)))
        self.overhead = min(self._seconds(_nothing, self.repeats) for _ in range(5))

    def __call__(self) -> float:
        return max(0.0, self._seconds(self.call, self.repeats) - self.overhead) / self.repeats

    def _seconds(self, call: Callable[[], object], repeats: int) -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        if self.synchronize is not None:
            self.synchronize()
        return time.perf_counter() - began


@dataclass
class Conditions:
    """What the machine was like meanwhile. load: its average over the last minute at the begin and at the end. cores:
    those that this program may use. others: how many of them other programs kept busy, on average. mhz: the processor's
    frequency at the begin and at the end; None where the system does not tell.
    """

    seconds: float = 0.0
    load: tuple[float, float] = (0.0, 0.0)
    others: float = 0.0
    cores: int = 1
    mhz: tuple[float, float] | None = None

    def doubts(self) -> list[str]:
        """Why nothing measured meanwhile is reliable; empty where nothing speaks against it."""
        found = []
        if self.others > min(_OTHERS * self.cores, _OTHERS_OF_ONE):
            found.append(
                f"other programs kept {self.others:.1f} of {self.cores} cores busy (load average {self.load[1]:.1f}): "
                "stop them"
            )
        if self.mhz is not None and abs(self.mhz[1] - self.mhz[0]) > 0.1 * self.mhz[0]:
            found.append(
                f"the processor went from {self.mhz[0]:.0f} to {self.mhz[1]:.0f} MHz: fix its frequency, or let it cool"
            )
        return found

    def __str__(self) -> str:
        """In a sentence."""
        mhz = f", at {' to '.join(f'{value:,.0f}' for value in dict.fromkeys(self.mhz))} MHz" if self.mhz else ""
        load = " to ".join(dict.fromkeys(f"{value:.1f}" for value in self.load))
        return (
            f"Meanwhile the load average was {load}, other programs had {self.others:.1f} of {self.cores} cores{mhz}."
        )

    def row(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "sentence": str(self),
            "seconds": round(self.seconds, 1),
            "load_average": [round(value, 2) for value in self.load],
            "cores_of_others": round(self.others, 2),
            "mhz": None if self.mhz is None else [round(value) for value in self.mhz],
        }


@contextmanager
def watched() -> Iterator[Conditions]:
    """The conditions of the `with` block, complete when it ends."""
    found = Conditions(cores=len(_cores()))
    began, busy, own, load, mhz = time.monotonic(), _busy(), _own(), _load(), _mhz()
    try:
        yield found
    finally:
        found.seconds = time.monotonic() - began
        found.load = (load, _load())
        others = (_busy() - busy) - (_own() - own)
        found.others = max(0.0, others) / max(found.seconds, 1e-9)
        later = _mhz()
        found.mhz = None if mhz is None or later is None else (mhz, later)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _nothing() -> None:
    pass


def _cores() -> set[int]:
    """Those that this program may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _busy() -> float:
    """Seconds that `_cores` have worked, for whomever."""
    mine = _cores()
    idle = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is in "user" already
    return float(
        sum(
            sum(times) - sum(getattr(times, name, 0.0) for name in idle)
            for core, times in enumerate(psutil.cpu_times(percpu=True))
            if core in mine
        )
    )


def _own() -> float:
    used = psutil.Process().cpu_times()
    return float(used.user + used.system)


def _load() -> float:
    return float(psutil.getloadavg()[0])


def _mhz() -> float | None:
    frequency = psutil.cpu_freq()
    return None if frequency is None or not frequency.current else float(frequency.current)
