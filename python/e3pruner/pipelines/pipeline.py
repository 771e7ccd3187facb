"""The whole way from a dense model to a recovered one, in stages that are kept: an interrupted run repeats none."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import e3pruner
from e3pruner.evaluation import latency
from e3pruner.evaluation.generation import continue_prompt
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.units import units_of
from e3pruner.models.loading import Dtype, load_model
from e3pruner.pipelines.results import recovery_results, search_results
from e3pruner.pipelines.stages import Stages
from e3pruner.precision import autocast_dtype
from e3pruner.recovery.state import going_on
from e3pruner.surgery import PruningPlan
from e3pruner.surgery.plan import PLAN_FILE
from e3pruner.text.sequences import Rows
from e3pruner.text.splits import Tokens, batches, take

METHOD, RIVALS = "gumbel-topk", ("leave-one-out", "bi")
MEASURED_FILE = "measured.json"
PRUNED, RECOVERED = "pruned", "recovered"
MODELS = ("dense", PRUNED, RECOVERED)
PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences what a hash table is.",
    "Write the first sentence of a story about a lighthouse.",
)


@dataclass(frozen=True)
class Budget:
    """What a run may spend: sequences, steps, points of the curve, new tokens a prompt, and timings a model."""

    calibration: int = 16
    held_out: int = 16
    search_steps: int = 16
    curve_points: int = 4
    training_steps: int = 50
    new_tokens: int = 48
    repeats: int = 3
    batch: int = 4


FULL = Budget()
QUICK = Budget(
    calibration=4,
    held_out=4,
    search_steps=4,
    curve_points=0,
    training_steps=6,
    new_tokens=16,
    repeats=1,
)


@dataclass(frozen=True)
class Pipeline(Stages):
    """One run of the demo."""

    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens: Tokens
    budget: Budget
    drop: int
    seed: int

    def run(self) -> dict[str, Any]:
        """All stages in their order; the parts of the results that they give (see `e3pruner.report.results`)."""
        found = self.stage("1-search", self.search)
        models = self.stage("2-prune", lambda: self.prune(found))
        curve = self.stage("3-compare", lambda: self.curve(found, models))
        recovery = self.stage("4-recover", self.recover)
        recovered = self.stage("5-evaluate", lambda: self.evaluate(self.load(RECOVERED)))
        speeds = self.stage("6-time", self.time)
        answers = self.stage("7-generate", self.generate)
        measured = {"dense": models["dense"], PRUNED: models[METHOD], RECOVERED: recovered}
        return {
            **search_results(PruningPlan.load(self.folder / PLAN_FILE)),
            "methods": [{"method": method, **found[method], **models[method]} for method in found],
            "curve": curve,
            "recovery": recovery,
            "models": [{"name": name, **values, **speeds[name]} for name, values in measured.items()],
            "generations": answers,
            "seconds": self.seconds(),
        }

    def clean(self) -> None:
        """Deletes what only a resumed run would need."""
        self.clear()
        (self.folder / MEASURED_FILE).unlink()
        shutil.rmtree(self.folder / "training", ignore_errors=True)

    @property
    def calibration(self) -> list[Rows]:
        return batches(take(self.tokens.calibration, self.budget.calibration, "calibration"), self.budget.batch)

    @property
    def held_out(self) -> list[Rows]:
        return batches(take(self.tokens.held_out, self.budget.held_out, "held-out"), self.budget.batch)

    def search(self) -> dict[str, Any]:
        """For the method and its rivals, on the same tokens: the mask, the order of layers behind it, and the cost."""
        return {method: self.search_by(method) for method in (METHOD, *RIVALS)}

    def search_by(self, method: str) -> dict[str, Any]:
        checkpoint = self.folder / MEASURED_FILE  # one for all: a mask measured for one method is known to the next
        began = time.perf_counter()
        options: dict[str, Any] = {"steps": self.budget.search_steps} if method == METHOD else {}
        plan = e3pruner.search(
            self.dense, self.calibration, self.drop, method, self.seed, checkpoint=checkpoint, **options
        )
        if method == METHOD:
            plan.save(self.folder / PLAN_FILE)
        seconds = round(time.perf_counter() - began, 1)
        return {"removed": plan.removed, "order": order(plan), "cost": plan.metrics["cost"], "seconds": seconds}

    def prune(self, found: dict[str, Any]) -> dict[str, Any]:
        """Exports the pruned model; held-out figures of the dense model and of every mask."""
        measured = {"dense": self.evaluate(self.dense)}
        for method, mask in found.items():
            plan = PruningPlan.of_removed(mask["removed"], len(mask["order"]))
            pruned = e3pruner.prune(self.dense, plan, copy_weights=False)
            measured[method] = self.evaluate(pruned)
            if method == METHOD:
                self.export(pruned, self.tokenizer, PRUNED)
        return measured

    def load(self, name: str) -> PreTrainedModel:
        """A model of this run: the dense one, or one that an earlier stage exported."""
        return self.dense if name == "dense" else load_model(str(self.folder / name), dtype=Dtype.FLOAT32)

    def recover(self) -> dict[str, Any]:
        student = self.load(PRUNED)
        training = self.folder / "training"
        state = going_on(training)
        result = e3pruner.distill(
            student,
            teacher=self.dense,
            data=self.tokens.training,
            held_out=self.held_out,
            **state,
            steps=self.budget.training_steps,
            batch_size=self.budget.batch,
            seed=self.seed,
        )
        self.export(student, self.tokenizer, RECOVERED)
        return recovery_results(result)["recovery"]

    def evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        return e3pruner.evaluate(model, self.held_out, self.dense, precision="auto")

    def curve(self, found: dict[str, Any], models: dict[str, Any]) -> dict[str, list[list[float]]]:
        """Held-out KL without each method's first choices: some numbers of layers, and `drop` as in `models`."""
        points = self.budget.curve_points
        if not points:
            return {}
        counts = sorted({math.ceil(self.drop * point / points) for point in range(1, points)} - {self.drop})
        precision = autocast_dtype("auto", self.dense.device)
        with SearchProblem(
            self.dense, self.held_out, units=units_of(self.dense, self.drop), dtype=precision
        ) as problem:
            masks = {(m, n): problem.mask(mask["order"][:n]) for m, mask in found.items() for n in counts}
            values = dict(zip(masks, problem.score(list(masks.values())), strict=True))
        return {
            method: [*([n, values[method, n]] for n in counts), [self.drop, models[method]["kl"]]] for method in found
        }

    def time(self) -> dict[str, Any]:
        return {name: latency(self.load(name), repeats=self.budget.repeats) for name in MODELS}

    def generate(self) -> list[dict[str, Any]]:
        models = {name: self.load(name) for name in MODELS}
        return [
            {"prompt": prompt, "answers": {name: self.answer(model, prompt) for name, model in models.items()}}
            for prompt in PROMPTS
        ]

    def answer(self, model: PreTrainedModel, prompt: str) -> str:
        ids = continue_prompt(model, self.tokenizer, prompt, self.budget.new_tokens)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def order(plan: PruningPlan) -> list[int]:
    """The layers from the first to go to the last: what the search removes, then the others, by its final values."""
    values = next(record[key] for record in reversed(plan.history) for key in ("logits", "importance") if key in record)
    return sorted(range(plan.num_layers), key=lambda layer: (layer not in plan.removed, values[layer], -layer))
