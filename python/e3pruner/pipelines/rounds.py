"""Prune, compensate, recover, and again: a few layers a round, each round from the recovered model of the last."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import e3pruner
from e3pruner.models import find_layers
from e3pruner.models.loading import Dtype, load_model
from e3pruner.pipelines.results import recovery_results
from e3pruner.pipelines.stages import Stages
from e3pruner.recovery.state import going_on
from e3pruner.recovery.tracking import TRACKED
from e3pruner.surgery import PruningPlan
from e3pruner.surgery.plan import PLAN_FILE
from e3pruner.text.sequences import Rows

CACHE, MEASURED = "cache", "measured"
PRUNED, RECOVERED = "pruned", "recovered"


@dataclass(frozen=True)
class Schedule:
    """What `Rounds` do: `drop` layers in `rounds` rounds, `search` and `recover` being options of the library calls."""

    drop: int
    rounds: int
    method: str
    search: dict[str, Any]
    compensate: str
    recover: dict[str, Any]
    cached: bool
    track: str | None
    seed: int

    def drops(self, number: int) -> int:
        """Layers that round `number`, from 1, removes: as even a share as whole layers allow."""
        return self.drop * number // self.rounds - self.drop * (number - 1) // self.rounds


@dataclass(frozen=True)
class Rounds(Stages):
    """A run from `dense` to a recovered model. `judge`: the text of another kind that "auto" compensation needs;
    `batch`: sequences at a time for all but the training.
    """

    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    training: Rows
    calibration: Rows
    judge: Rows | None
    held_out: Rows
    schedule: Schedule
    batch: int

    def run(self) -> dict[str, Any]:
        """All stages in their order; the parts of the results that they give (see `e3pruner.report.results`)."""
        if self.schedule.cached:
            self.stage("0-cache", self.cache)
        measured = {"dense": self.stage("0-evaluate", lambda: self.evaluate(self.dense))}
        kept = list(range(len(find_layers(self.dense))))
        curves = []
        for number in range(1, self.schedule.rounds + 1):
            plan = PruningPlan(**self.stage(f"{number}-search", partial(self.search, number)))
            kept = [kept[layer] for layer in plan.kept]
            self.stage(f"{number}-prune", partial(self.prune, number, plan))
            measured[f"{PRUNED}, round {number}"] = self.measured(number, PRUNED)
            curves.append(self.stage(f"{number}-recover", partial(self.recover, number, plan)))
            measured[f"{RECOVERED}, round {number}"] = self.measured(number, RECOVERED)
        removed = sorted(set(range(len(find_layers(self.dense)))) - set(kept))
        PruningPlan(kept, removed, self.schedule.method, self.schedule.seed).save(self.folder / PLAN_FILE)
        return {
            "layers": len(kept) + len(removed),
            "removed": removed,
            "rounds": curves,
            "recovery": curves[-1],
            "models": [{"name": name, **values} for name, values in measured.items()],
            "seconds": self.seconds(),
        }

    def clean(self) -> None:
        """Deletes what only a resumed run would need."""
        self.clear()
        names = [self.name(number, kind) for number in range(1, self.schedule.rounds) for kind in (PRUNED, RECOVERED)]
        names += [f"training-{number}" for number in range(1, self.schedule.rounds + 1)]
        for name in (*names, CACHE):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def name(self, number: int, kind: str) -> str:
        """The folder of a checkpoint; that of the last round has the plain name."""
        return kind if number == self.schedule.rounds else f"{kind}-{number}"

    def load(self, number: int, kind: str) -> PreTrainedModel:
        return load_model(str(self.folder / self.name(number, kind)), str(self.dense.device), Dtype.FLOAT32)

    def cache(self) -> None:
        temperature = self.schedule.recover.get("temperature", 1.0)
        e3pruner.cache_teacher(
            self.dense, self.training, self.folder / CACHE, tokenizer=self.tokenizer, temperature=temperature
        )

    def start(self, number: int) -> PreTrainedModel:
        """What round `number` prunes."""
        return self.dense if number == 1 else self.load(number - 1, RECOVERED)

    def search(self, number: int) -> dict[str, Any]:
        schedule, checkpoint = self.schedule, self.folder / f"{MEASURED}-{number}.json"
        batches, drop = list(self.calibration.split(self.batch)), schedule.drops(number)
        plan = e3pruner.search(
            self.start(number), batches, drop, schedule.method, schedule.seed, checkpoint=checkpoint, **schedule.search
        )
        checkpoint.unlink()
        return {"kept": plan.kept, "removed": plan.removed}

    def prune(self, number: int, plan: PruningPlan) -> dict[str, Any]:
        """Cuts and compensates; the method that was chosen, and the KL of each that was tried."""
        start = self.start(number)
        pruned = e3pruner.prune(start, plan)
        found = e3pruner.compensate(
            pruned, start, plan, self.calibration, judge=self.judge, method=self.schedule.compensate
        )
        self.export(pruned, self.tokenizer, self.name(number, PRUNED))
        return {"method": found.method, "kl": found.kl}

    def recover(self, number: int, plan: PruningPlan) -> dict[str, Any]:
        student, training = self.load(number, PRUNED), self.folder / f"training-{number}"
        teacher = e3pruner.TeacherCache(self.folder / CACHE) if self.schedule.cached else self.dense
        result = e3pruner.distill(
            student,
            teacher=teacher,
            data=self.training,
            held_out=self.held_out,
            plan=plan,
            **going_on(training),
            track=self.schedule.track,
            track_folder=self.folder / TRACKED / f"round-{number}",
            seed=self.schedule.seed,
            **self.schedule.recover,
        )
        self.export(student, self.tokenizer, self.name(number, RECOVERED))
        return recovery_results(result)["recovery"]

    def measured(self, number: int, kind: str) -> dict[str, Any]:
        return self.stage(f"{number}-evaluate-{kind}", lambda: self.evaluate(self.load(number, kind)))

    def evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        return e3pruner.evaluate(model, self.held_out.split(self.batch), self.dense, precision="auto")
