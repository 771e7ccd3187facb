"""The providers of a case, measured in turns: time, memory above the inputs, and what the figures are relative to."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from e3pruner.profiling.doubts import above_ceiling
from e3pruner.profiling.process_memory import peak_above_inputs
from e3pruner.report.benchmarks import FLOOR
from e3pruner.timing import Estimate, Timed, all_settled, in_turns, unsettled, watched

# Seconds that each provider of a case gets at most, beyond the fewest rounds; and the most rounds.
BUDGET, FEWEST, MOST = 2.0, 5, 200
_REMEDY = "measure again, with nothing else at work"


class _Contestant(NamedTuple):
    row: dict[str, Any]
    call: Callable[[], object]
    grad: bool


class Turns:
    """What waits for its turn, all of one case, and the rows of the cases that are done."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._waiting: list[_Contestant] = []

    def add(self, row: dict[str, Any], call: Callable[[], object]) -> None:
        """`call`, whose time is wanted in `row`, in the present grad mode."""
        self._waiting.append(_Contestant(row, call, torch.is_grad_enabled()))

    def take(self) -> None:
        """Times all that wait, in rounds, until each is known to 2 % or the budget is used up."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        with torch.set_grad_enabled(waiting[0].grad):
            actions = {each.row["provider"]: Timed(each.call) for each in waiting}
            with watched() as conditions:
                seconds = in_turns(actions, FEWEST, most=MOST, limit=BUDGET * len(actions), settled=all_settled)
        times = {provider: Estimate.of_times(values) for provider, values in seconds.items()}
        for row, *_ in waiting:
            values, time = sorted(seconds[row["provider"]]), times[row["provider"]]
            name = f"{row['op']} {row['phase']} {row['dtype']} {row['provider']}"
            doubts = conditions.doubts() + unsettled({name: time}, _REMEDY)
            if FLOOR in times:
                doubts += above_ceiling(name, time, times[FLOOR], times[FLOOR].value / time.value)
            self.rows.append(
                row
                | {"median": statistics.median(values), "quartiles": [time.low, time.high], "rounds": time.rounds}
                | {"doubts": doubts, "conditions": conditions.row()}
            )


def measure(
    turns: Turns, call: Callable[[], object], *, op: str, provider: str, phase: str, dtype: torch.dtype,
    sizes: dict[str, int], work: float, unit: str, errors: tuple[float, float] | None = None, **details: object,
) -> None:  # fmt: skip
    """Measures the memory of `call` now, and lets it wait for its turn with the other providers of its case.

    `work` is what the operation must move ("B") or compute ("FLOP") at least; `unit` says which. The provider named
    `floor` is the physical bound: the rows of one case differ in nothing but the provider.
    """
    call()  # what is made once: compiled code, threads, primitives
    row = {
        "op": op, "provider": provider, "phase": phase, "dtype": str(dtype).removeprefix("torch."), **sizes,
        "work": work, "unit": unit, "peak_bytes": peak_above_inputs(call), "loss_error": errors and errors[0],
        "grad_error": errors and errors[1], **details,
    }  # fmt: skip
    turns.add(row, call)
