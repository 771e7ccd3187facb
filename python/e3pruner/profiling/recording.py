"""Some steps of somebody else's training loop, as a profile and its page."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import nn

import e3kernels
from e3kernels.profiling import MemoryTimeline, Profile, Range, Timeline, named_range
from e3kernels.profiling.trace import top_level
from e3pruner.profiling import plots
from e3pruner.profiling.model.page import memory_row, memory_section
from e3pruner.profiling.page import Page, Section, Table, figures, percent, write_page
from e3pruner.profiling.step.profile import STEP
from e3pruner.report import describe_environment

_MOST_OPERATORS = 20


class StepRecording:
    """Profiles the optimizer steps `first` to `last`, both included, the first step being 1, and writes the page of
    `e3 profile step` with the Chrome trace into `folder`.

    The first steps of a run allocate and warm up: begin at the third or later. Raises ValueError unless
    1 ≤ first ≤ last.
    """

    def __init__(self, folder: str | os.PathLike[str], first: int = 3, last: int = 5) -> None:
        if not 1 <= first <= last:
            raise ValueError(f"first={first}, last={last}: must be 1 ≤ first ≤ last")
        self.folder, self.first, self.last = Path(folder), first, last
        self._step: ExitStack | None = None
        self._recording: ExitStack | None = None
        self._profile = Profile()
        self._before: dict[str, int] = {}

    def begin(self, step: int, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Called before optimizer step `step`; again is no harm, as before each of its batches."""
        if self._recording is None and step == self.first:
            self._before = _held(model, optimizers)
            self._recording = ExitStack()
            self._profile = self._recording.enter_context(e3kernels.profile(self.folder))
        if self._recording is not None and self._step is None:
            self._step = ExitStack()
            self._step.enter_context(named_range(STEP))

    def end(self, step: int) -> None:
        """Called when optimizer step `step` is done."""
        if self._step is not None:
            self._step.close()
            self._step = None
        if step >= self.last:
            self.close()

    def close(self) -> None:
        """Ends a profile that is still running, as after an early stop, and writes its page; else does nothing."""
        if self._recording is None:
            return
        if self._step is not None:
            self._step.close()
        recording, self._recording, self._step = self._recording, None, None
        recording.close()
        page = recorded_page(self._profile, self._before, f"Steps {self.first} to {self.last}")
        write_page(page, self.folder, describe_environment(), "e3pruner.profiling, in a training loop")


def recorded_page(profile: Profile, before: dict[str, int], title: str) -> Page:
    """Phases, operators and memory of a profile whose steps are ranges "step"; `before`: bytes held at its begin."""
    phases = profile.trace.phases()
    steps = [r for r in phases if r.name == STEP]
    whole = sum(r.end - r.start for r in steps) / len(steps)
    seconds: dict[str, float] = {}
    for path, value in Timeline(_inside(phases, steps)).seconds().items():
        if path[0] == STEP:
            name = path[-1] if len(path) > 1 else "rest"
            seconds[name] = seconds.get(name, 0.0) + value / len(steps)
    rows = [[name, *figures([1e3 * value]), percent(value / whole)] for name, value in seconds.items()]
    rows.append(["a step", *figures([1e3 * whole]), ""])
    memory = MemoryTimeline.of(profile.trace, before)
    operators = _operator_rows(profile, len(steps))
    sections = [
        Section(
            "A step",
            f"Mean of {len(steps)} steps, with the profiler's own cost.",
            [Table("Phases", ["phase", "ms", "of the step"], rows)],
            {"phases": partial(plots.phase_bars, {"a step": seconds})},
        ),
        Section("Operators", "The longest, those that they called included.", [operators], {}),
        memory_section(memory, None),
    ]
    found = [{"kind": "phase", "phase": name, "seconds": value} for name, value in seconds.items()]
    return Page(title, "Where the steps of this training run spend time and memory.", sections, [
        *found, {"kind": "step", "seconds": whole}, memory_row(memory, None)
    ])  # fmt: skip


def _inside(ranges: list[Range], steps: list[Range]) -> list[Range]:
    return [r for r in ranges if any(step.start <= r.start and r.end <= step.end for step in steps)]


def _operator_rows(profile: Profile, steps: int) -> Table:
    total: dict[str, tuple[int, float]] = {}
    for operator in top_level(profile.trace.operators):
        calls, seconds = total.get(operator.name, (0, 0.0))
        total[operator.name] = calls + 1, seconds + operator.end - operator.start
    longest = sorted(total.items(), key=lambda item: -item[1][1])[:_MOST_OPERATORS]
    rows = [
        [name.removeprefix("autograd::engine::evaluate_function: "), *figures([calls / steps, 1e3 * seconds / steps])]
        for name, (calls, seconds) in longest
    ]
    return Table("Operators of a step", ["operator", "calls", "ms"], rows)


def _held(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, int]:
    """Bytes of weights, optimizer states and gradients at this moment."""
    states = [v for o in optimizers for state in o.state.values() for v in state.values() if torch.is_tensor(v)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "optimizer": sum(v.nbytes for v in states),
        "gradients": sum(g.nbytes for g in gradients),
    }
