"""Where a search step and a recovery step spend their time and memory, with the fused losses and with eager ones."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from e3pruner.profiling.fit import check_training_fits
from e3pruner.profiling.model.engines import synchronizer
from e3pruner.profiling.model.profile import middle
from e3pruner.profiling.process_memory import peak_above_inputs
from e3pruner.recovery import DistillOptions, LiveTeacher, Teacher, distill
from e3pruner.recovery.teacher import narrowed
from e3pruner.surgery import prune

STEP = "step"


@dataclass
class StepProfile:
    """One kind of step ("search" or "recovery") with "fused" or "eager" losses.

    seconds: of a step, the median; phases: of them in each named phase; their sum leaves out what no phase covers.
    tokens: that go through a model in a step. memory, growth: of the traced run, and the process's own growth.
    """

    kind: str
    losses: str
    seconds: float
    phases: dict[str, float]
    tokens: int
    memory: MemoryTimeline
    growth: int | None
    traced: Profile = field(repr=False)

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
    seed: int = 0,
    folder: Path | None = None,
) -> StepProfiles:
    """Profiles of `rounds` steps, after one that does not count, on token ids (N, S), `batch` sequences per step.

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
    found = []
    measured: dict[str, list[float]] = {}
    for losses in ("fused", "eager"):
        traces = folder if losses == "fused" else None
        run = _Run(model, sequences, losses, kept, protected, batch, rounds, seed, traces, measured)
        found.append(_search(run._replace(folder=run.folder and run.folder / "search")))
        if refusal is None:
            found.append(_recovery(run._replace(folder=run.folder and run.folder / "recovery")))
    return StepProfiles(found, refusal)


class _Run(NamedTuple):
    """What both kinds of step are profiled on."""

    model: PreTrainedModel
    sequences: Tensor
    losses: str
    kept: list[int]  # by the student
    protected: list[int]
    batch: int
    rounds: int
    seed: int
    folder: Path | None
    measured: dict[str, list[float]]  # by the search's importance start


def _search(run: _Run) -> StepProfile:
    model, rounds = run.model, run.rounds
    with _started(run) as (problem, running):

        def step() -> None:
            with named_range(STEP):
                next(running)

        step()
        problem.account.clear()  # the teacher's passes belong to the steps, which make them
        with RangeRecorder(synchronizer(model.device)) as recorder:
            for _ in range(rounds):
                step()
        tokens = round(problem.account.cost / rounds)
        growth = peak_above_inputs(step)
        with e3kernels.profile(run.folder) as traced:
            step()
        weights = sum(p.nbytes for p in model.parameters())
    own = sum(p.nbytes for p in model.parameters())
    before = {"weights": own if weights == own else own + weights}
    seconds, phases = _of_steps(recorder.ranges)
    memory = MemoryTimeline.of(traced.trace, before)
    return StepProfile("search", run.losses, seconds, phases, tokens, memory, growth, traced)


@contextmanager
def _started(run: _Run) -> Iterator[tuple[SearchProblem, Search]]:
    """A search that has its importance start behind it. What that measured is taken from `run.measured`, or put there;
    then no batch has met the teacher, and every step is one on new text.
    """
    text = Calibration(run.sequences[: run.batch * (run.rounds + 3)].split(run.batch), run.model.device)

    def search() -> tuple[SearchProblem, Search]:
        problem = SearchProblem(
            run.model,
            text,
            units=units_of(run.model, len(find_layers(run.model)) - len(run.kept), run.protected),
            seed=run.seed,
            dtype=autocast_dtype("auto", run.model.device),
            measurements=Measurements(dict(run.measured)),
            divergences=divergences if run.losses == "fused" else _eager_divergences,
        )
        return problem, METHODS["gumbel-topk"](problem, steps=run.rounds + 3)

    if not run.measured:
        problem, running = search()
        with problem:
            next(running)
        run.measured.update(problem.measurements.measured)
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


def _recovery(run: _Run) -> StepProfile:
    model = run.model
    student = prune(model, run.kept).float()

    def train(steps: int) -> None:
        with _teacher(model, run.losses) as teacher:
            distill(student, teacher=teacher, data=run.sequences, steps=steps, batch_size=run.batch, seed=run.seed)

    with RangeRecorder(synchronizer(model.device)) as recorder:
        train(run.rounds + 1)
    seconds, phases = _of_steps(recorder.ranges, skip=1)
    growth = peak_above_inputs(lambda: train(2))
    with e3kernels.profile(run.folder) as traced:
        train(2)
    before = {"weights": sum(p.nbytes for each in (model, student) for p in each.parameters())}
    memory = MemoryTimeline.of(traced.trace, before)
    tokens = run.batch * run.sequences.shape[1]
    return StepProfile("recovery", run.losses, seconds, phases, tokens, memory, growth, traced)


def _of_steps(ranges: list[Range], skip: int = 0) -> tuple[float, dict[str, float]]:
    """Median seconds of the steps, and of each phase directly inside them."""
    steps = sorted((r for r in ranges if r.name == STEP), key=lambda r: r.start)[skip:]
    rows = []
    for step in steps:
        inside = [r for r in ranges if step.start <= r.start and r.end <= step.end]
        total: dict[str, float] = {}
        for path, seconds in Timeline(inside).seconds().items():
            if len(path) > 1:
                total[path[1]] = total.get(path[1], 0.0) + seconds
        rows.append(total)
    names = list(dict.fromkeys(name for row in rows for name in row))
    median = {name: statistics.median(row.get(name, 0.0) for row in rows) for name in names}
    return statistics.median(step.end - step.start for step in steps), median


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
