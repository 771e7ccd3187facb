"""Some steps of somebody else's training loop, as a profile and its page."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
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
from e3pruner.profiling.ranged import ranged_method
from e3pruner.profiling.step.profile import STEP
from e3pruner.report import describe_environment
from e3pruner.report.table import plural
from e3pruner.storage import new_folder
from e3pruner.timing import Conditions, Estimate, unsettled, watched

_MOST_OPERATORS = 20
FORWARD = "forward"


class StepRecording:
    """Profiles the optimizer steps `first` to `last`, both included, the first step being 1, and writes the page of
    `e3 profile step` with the Chrome trace into `folder`, which appears when they are whole.

    The first steps of a run allocate and warm up: begin at the third or later. Where training ends before one of them
    did, nothing is written, and a warning says so. Raises, before training, ValueError unless 1 ≤ first ≤ last, and
    FileExistsError where `folder` exists.
    """

    def __init__(self, folder: str | os.PathLike[str], first: int = 3, last: int = 5) -> None:
        if not 1 <= first <= last:
            raise ValueError(f"first={first}, last={last}: must be 1 ≤ first ≤ last")
        self.folder, self.first, self.last = Path(folder), first, last
        if self.folder.exists():
            raise FileExistsError(f"folder={folder} exists, and a profile replaces nothing; name another")
        self._step: ExitStack | None = None
        self._recording: ExitStack | None = None
        self._before: dict[str, int] = {}
        self._recorded: list[int] = []  # the steps that were recorded from begin to end

    def begin(
        self, step: int, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], forward: str = "forward"
    ) -> None:
        """Called before optimizer step `step`; again is no harm, as before each of its batches. Calls of `model`'s
        method `forward` are the phase "forward".
        """
        if self._recording is None and step == self.first and not self._recorded:
            self._before = _held(model, optimizers)
            self._recording = self._started(model, forward)
        if self._recording is not None and self._step is None:
            self._step = ExitStack()
            self._step.enter_context(named_range(f"ProfilerStep#{step}"))

    def end(self, step: int) -> None:
        """Called when optimizer step `step` is done."""
        if self._step is not None:
            self._step.close()
            self._step = None
            self._recorded.append(step)
        if step >= self.last:
            self._finish()

    def close(self) -> None:
        """Called at the end of training, however that comes about: ends a profile that is still running."""
        if self._step is not None:  # a step that broke off
            self._step.close()
            self._step = None
        self._finish()
        if not self._recorded:
            warnings.warn(
                f"no profile in {self.folder}: no step from first={self.first} to last={self.last} came to its end",
                stacklevel=2,
            )

    def _started(self, model: nn.Module, forward: str) -> ExitStack:
        """The running profile; what is left of it when it closes is published."""
        recording = ExitStack()
        found = Path(recording.enter_context(tempfile.TemporaryDirectory()))
        profile = Profile()
        conditions = Conditions()
        recording.callback(lambda: self._publish(profile, found, conditions))
        conditions = recording.enter_context(watched())
        profile = recording.enter_context(e3kernels.profile(found))
        ranged_method(recording, model, forward, FORWARD)
        return recording

    def _finish(self) -> None:
        if self._recording is not None:
            recording, self._recording = self._recording, None
            recording.close()

    def _publish(self, profile: Profile, found: Path, conditions: Conditions) -> None:
        if not self._recorded:
            return
        steps = f"Step {self._recorded[0]}" if len(self._recorded) == 1 else (
            f"Steps {self._recorded[0]} to {self._recorded[-1]}"
        )  # fmt: skip
        page = recorded_page(profile, self._before, steps, len(self._recorded))
        with new_folder(self.folder) as folder:
            shutil.copytree(found, folder, dirs_exist_ok=True)
            write_page(page, folder, describe_environment(), "e3pruner.profiling, in a training loop", conditions)


def recorded_page(profile: Profile, before: dict[str, int], title: str, count: int) -> Page:
    """Phases, operators and memory of the first `count` ranges "step"; `before`: bytes held when the profile began."""
    phases = profile.trace.phases()
    steps = sorted((r for r in phases if r.name == STEP), key=lambda r: r.start)[:count]
    times = Estimate.of_times([r.end - r.start for r in steps])
    whole = sum(r.end - r.start for r in steps) / len(steps)
    seconds: dict[str, float] = {}
    for path, value in Timeline(_inside(phases, steps)).seconds().items():
        if path[0] == STEP:
            name = _phase(path)
            seconds[name] = seconds.get(name, 0.0) + value / len(steps)
    rows = [[name, *figures([1e3 * value]), percent(value / whole)] for name, value in seconds.items()]
    rows.append(["a step", *figures([1e3 * whole]), ""])
    memory = MemoryTimeline.of(profile.trace, before)
    operators = _operator_rows(profile, len(steps))
    sections = [
        Section(
            "A step",
            f"Mean of {plural(len(steps), 'step')}, with the profiler's own cost.",
            [Table("Phases", ["phase", "ms", "of the step"], rows)],
            {"phases": partial(plots.phase_bars, {"a step": seconds})},
        ),
        Section("Operators", "The longest, those that they called included.", [operators], {}),
        memory_section(memory, None),
    ]
    found = [{"kind": "phase", "phase": name, "seconds": value} for name, value in seconds.items()]
    return Page(title, "Where the steps of this training run spend time and memory.", sections, [
        *found, {"kind": "step", "seconds": whole}, memory_row(memory, None)
    ], unsettled({"a step": times}, "record more steps"))  # fmt: skip


def trace_page(profile: Profile, title: str) -> Page:
    """Ranges, operators and memory of any block that `e3kernels.profile` recorded."""
    seconds = profile.seconds()
    whole = sum(seconds.values())
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    rows = [[" › ".join(path), *figures([1e3 * value]), percent(value / whole)] for path, value in longest]
    memory = MemoryTimeline.of(profile.trace)
    sections = [
        Section("Ranges", "Each without the ranges inside it.", [Table("", ["range", "ms", "of all"], rows)], {}),
        Section("Operators", "The longest, those that they called included.", [_operator_rows(profile, 1)], {}),
        memory_section(memory, None),
    ]
    if longest:
        path, most = longest[0]
        summary = (
            f"Of {figures([1e3 * whole])[0]} ms in named ranges {percent(most / whole)} pass in {' › '.join(path)}."
        )
    else:
        summary = "The block has no named range; its operators and its memory follow."
    found = [{"kind": "range", "path": path, "seconds": value} for path, value in seconds.items()]
    return Page(title, summary, sections, [*found, memory_row(memory, None)])


def _phase(path: tuple[str, ...]) -> str:
    """The innermost phase of a step: a forward pass that a trainer of ours names is what that calls it."""
    named = [name for name in path[1:] if name != FORWARD]
    return named[-1] if named else path[-1] if len(path) > 1 else "rest"


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
    return Table("Operators", ["operator", "calls", "ms"], rows)


def _held(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, int]:
    """Bytes of weights, optimizer states and gradients at this moment."""
    states = [v for o in optimizers for state in o.state.values() for v in state.values() if torch.is_tensor(v)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "optimizer": sum(v.nbytes for v in states),
        "gradients": sum(g.nbytes for g in gradients),
    }
