"""Where a search step and a recovery step spend their time and memory, with the fused losses and with eager ones."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import e3kernels
from e3kernels import textbook
from e3kernels.ops.common.loss_call import TokenStats
from e3kernels.profiling import MemoryTimeline, Profile, Range, RangeRecorder, Timeline, named_range
from e3pruner.evaluation.figures import divergences
from e3pruner.evaluation.target import check_drop, number_to_drop
from e3pruner.mask_search import METHODS
from e3pruner.mask_search.calibration import Calibration
from e3pruner.mask_search.measurements import Measurements
from e3pruner.mask_search.method import Search
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.units import units_of
from e3pruner.models import OutputHead, find_layers
from e3pruner.models.stack import check_indices
from e3pruner.precision import autocast_dtype
from e3pruner.profiling.ceilings import synchronizer
from e3pruner.profiling.fit import check_training_fits
from e3pruner.profiling.model.profile import middle
from e3pruner.profiling.process_memory import peak_above_inputs
from e3pruner.recovery import DistillOptions, LiveTeacher, Teacher, distill
from e3pruner.recovery.teacher import narrowed
from e3pruner.surgery import prune
from e3pruner.timing import Estimate, faster_half, in_turns

STEP = "step"
LOSSES = ("fused", "eager")


@dataclass
class StepProfile:
    """One kind of step ("search" or "recovery") with "fused" or "eager" losses.

    seconds: of a step, the mean of the faster half of the rounds, of which `estimate` tells the spread; phases: of them
    in each named phase; their sum leaves out what no phase covers. tokens: that go through a model in a step. memory,
    growth: of the traced run, and the process's own growth.
    """

    kind: str
    losses: str
    seconds: float
    phases: dict[str, float]
    tokens: int
    memory: MemoryTimeline
    growth: int | None
    traced: Profile = field(repr=False)
    estimate: Estimate

    @property
    def covered(self) -> float:
        """The phases' share of the step."""
        return sum(self.phases.values()) / self.seconds


class StepProfiles(NamedTuple):
    """The profiles, and why the recovery's are not among them where the model cannot be cut."""

    steps: list[StepProfile]
    recovery_refusal: str | None


def profile_steps(
    model: PreTrainedModel,
    sequences: Tensor,
    *,
    drop: int | None = None,
    fraction: float | None = None,
    protect: Sequence[int] = (),
    batch: int = 4,
    rounds: int = 3,
    limit: float = 0.0,
    seed: int = 0,
    folder: Path | None = None,
) -> StepProfiles:
    """Profiles of steps on token ids (N, S), `batch` sequences per step, with fused and with eager losses in turn: for
    `rounds` rounds after one that does not count, and as many more as it takes until both are known to 2 %, `limit`
    seconds have passed for each kind of step, or the sequences are used up.

    The search draws and measures masks without `drop` layers (8 unless told), or a `fraction` of all, and none of
    `protect`; the recovery trains a student that lacks the middle ones of those that may go.
    Chrome traces of one step each are kept in `folder`/search and `folder`/recovery, if given.

    Raises ValueError for a `drop` that the model cannot lose, too few sequences, and a batch that does not fit in
    memory, from an estimate.
    """
    layers = len(find_layers(model))
    protected = check_indices("protect", protect, layers)
    count = number_to_drop(model, protected, drop=drop, fraction=fraction)
    check_drop(count, layers, len(protected))
    if len(sequences) < batch * (rounds + 3):
        raise ValueError(f"sequences has {len(sequences)}; {rounds + 3} steps of batch={batch} need more")
    check_training_fits(model, batch, sequences.shape[1])
    free = [layer for layer in range(layers) if layer not in protected]
    gone = [free[place] for place in middle(len(free), count)]
    kept = [layer for layer in range(layers) if layer not in gone]
    refusal = _recovery_refusal(model, kept)
    run = _Run(model, sequences, kept, protected, batch, rounds, limit, seed, folder)
    searched = _search(run)
    recovered = _recovery(run) if refusal is None else []
    return StepProfiles([profile for pair in zip_longest(searched, recovered) for profile in pair if profile], refusal)


class _Run(NamedTuple):
    """What both kinds of step are profiled on."""

    model: PreTrainedModel
    sequences: Tensor
    kept: list[int]  # by the student
    protected: list[int]
    batch: int
    rounds: int
    limit: float
    seed: int
    folder: Path | None

    @property
    def most(self) -> int:
        """The rounds that there is text for, besides the one that does not count and those of memory and trace."""
        return len(self.sequences) // self.batch - 3

    def traced(self, kind: str, losses: str) -> Path | None:
        """Where the trace of a step goes, if it is kept."""
        return self.folder / kind if self.folder is not None and losses == "fused" else None


class _Step(NamedTuple):
    """Seconds of one step, and of each phase directly inside it."""

    seconds: float
    phases: dict[str, float]


def _measured(run: _Run, steps: Mapping[str, Callable[[], object]]) -> dict[str, list[_Step]]:
    """The rounds of every one of `steps`, in turns: the last range "step" that a call leaves."""

    def recorded(step: Callable[[], object]) -> _Step:
        with RangeRecorder(synchronizer(run.model.device)) as recorder:
            step()
        return _last_step(recorder.ranges)

    def settled(rounds: Mapping[str, list[_Step]]) -> bool:
        return all(Estimate.of_times([step.seconds for step in steps]).settled for steps in rounds.values())

    actions = {losses: partial(recorded, step) for losses, step in steps.items()}
    return in_turns(actions, run.rounds, most=run.most, limit=run.limit, settled=settled)


def _search(run: _Run) -> list[StepProfile]:
    model, found = run.model, []
    own = sum(p.nbytes for p in model.parameters())
    with ExitStack() as stack:
        measured: dict[str, list[float]] = {}
        started = {losses: stack.enter_context(_started(run, losses, measured)) for losses in LOSSES}

        def step(losses: str) -> None:
            with named_range(STEP):
                next(started[losses][1])

        for problem, _ in started.values():
            problem.account.clear()  # the teacher's passes belong to the steps, which make them
        rounds = _measured(run, {losses: partial(step, losses) for losses in LOSSES})
        tokens = {losses: round(started[losses][0].account.cost / (len(rounds[losses]) + 1)) for losses in LOSSES}
        weights = sum(p.nbytes for p in model.parameters())
        before = {"weights": own if weights == own else own + weights}
        for losses in LOSSES:
            growth = peak_above_inputs(partial(step, losses))
            with e3kernels.profile(run.traced("search", losses), force=True) as traced:
                step(losses)
            memory = MemoryTimeline.of(traced.trace, before)
            times = _typical(rounds[losses])
            found.append(StepProfile("search", losses, *times[:2], tokens[losses], memory, growth, traced, times[2]))
    return found


@contextmanager
def _started(run: _Run, losses: str, measured: dict[str, list[float]]) -> Iterator[tuple[SearchProblem, Search]]:
    """A search that has its importance start behind it. What that measured is taken from `measured`, or put there; then
    no batch has met the teacher, and every step is one on new text.
    """
    text = Calibration(run.sequences[: run.batch * (run.most + 3)].split(run.batch), run.model.device)

    def search() -> tuple[SearchProblem, Search]:
        problem = SearchProblem(
            run.model,
            text,
            units=units_of(run.model, len(find_layers(run.model)) - len(run.kept), run.protected),
            seed=run.seed,
            dtype=autocast_dtype("auto", run.model.device),
            measurements=Measurements(dict(measured)),
            divergences=divergences if losses == "fused" else _eager_divergences,
        )
        return problem, METHODS["gumbel-topk"](problem, steps=run.most + 3, tolerance=0.0)  # which it never ends before

    if not measured:
        problem, running = search()
        with problem:
            next(running)
        measured.update(problem.measurements.measured)
    problem, running = search()
    with problem:
        next(running)
        yield problem, running


def _recovery_refusal(model: PreTrainedModel, kept: list[int]) -> str | None:
    """Why there is no student to recover: models whose layers follow from their index cannot lose those."""
    try:
        prune(model, kept, copy_weights=False)
    except ValueError as error:
        return str(error)
    return None


def _recovery(run: _Run) -> list[StepProfile]:
    model, found = run.model, []
    students = {losses: prune(model, run.kept).float() for losses in LOSSES}

    def train(losses: str) -> None:
        """Two steps, of which the second is that of a run under way."""
        with _teacher(model, losses) as teacher:
            options: dict[str, Any] = {"steps": 2, "batch_size": run.batch, "seed": run.seed}
            distill(students[losses], teacher=teacher, data=run.sequences, **options)

    rounds = _measured(run, {losses: partial(train, losses) for losses in LOSSES})
    tokens = run.batch * run.sequences.shape[1]
    for losses, student in students.items():
        growth = peak_above_inputs(partial(train, losses))
        with e3kernels.profile(run.traced("recovery", losses), force=True) as traced:
            train(losses)
        before = {"weights": sum(p.nbytes for each in (model, student) for p in each.parameters())}
        memory, times = MemoryTimeline.of(traced.trace, before), _typical(rounds[losses])
        found.append(StepProfile("recovery", losses, *times[:2], tokens, memory, growth, traced, times[2]))
    return found


def _last_step(ranges: list[Range]) -> _Step:
    step = max((r for r in ranges if r.name == STEP), key=lambda r: r.start)
    inside = [r for r in ranges if step.start <= r.start and r.end <= step.end]
    phases: dict[str, float] = {}
    for path, seconds in Timeline(inside).seconds().items():
        if len(path) > 1:
            phases[path[1]] = phases.get(path[1], 0.0) + seconds
    return _Step(step.end - step.start, phases)


def _typical(rounds: list[_Step]) -> tuple[float, dict[str, float], Estimate]:
    """Seconds of a step and of its phases, all of the same rounds, so that they add up; and the former's spread."""
    estimate = Estimate.of_times([step.seconds for step in rounds])
    fast = faster_half(rounds, lambda step: step.seconds)
    names = list(dict.fromkeys(name for step in rounds for name in step.phases))
    phases = {name: statistics.mean(step.phases.get(name, 0.0) for step in fast) for name in names}
    return estimate.value, phases, estimate


def _eager_divergences(head: OutputHead, teacher: Tensor, students: Sequence[Tensor]) -> list[float]:
    """From whole logits, as plain PyTorch computes it."""
    target = head.logits(teacher).float()
    return [float(textbook.entropy_kl(head.logits(s).float(), target, weighting="none")) for s in students]


class _EagerTeacher(LiveTeacher):
    """A teacher whose loss materialises both models' logits."""

    def loss(self, hidden: Tensor, head: OutputHead, targets: Tensor, labels: Tensor, **options: Any) -> Any:
        student, teacher = head.logits(hidden).flatten(0, 1), self.head.logits(targets).flatten(0, 1)
        loss, weight = textbook.entropy_kl_tokens(student, teacher, labels.flatten(), kd_ratio=options["kd_ratio"])
        nothing = torch.zeros_like(weight)
        return loss.sum(), TokenStats(nothing, nothing, nothing, weight)


@contextmanager
def _teacher(model: PreTrainedModel, losses: str) -> Iterator[PreTrainedModel | Teacher]:
    if losses == "fused":
        yield model
        return
    dtype = autocast_dtype(DistillOptions().precision, model.device)
    with narrowed(model, dtype):
        yield _EagerTeacher(model, dtype)
