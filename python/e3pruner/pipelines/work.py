"""The stages of a pipeline, round by round, each from the recovered model of the last."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import e3pruner
from e3pruner.card import recovery_sentence, write_card
from e3pruner.evaluation import Speeds, speeds
from e3pruner.evaluation.generation import continue_prompt
from e3pruner.evaluation.target import check_drop, number_to_drop
from e3pruner.evaluation.writing import brief_writing
from e3pruner.mask_search.calibration import Calibration
from e3pruner.mask_search.held_out import held_out_figures
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.units import units_of
from e3pruner.models import find_layers
from e3pruner.models.loading import BUILT_IN, Dtype, load_model, load_tokenizer, weights_dtype
from e3pruner.models.stack import check_indices, check_unquantised
from e3pruner.pipelines.options import PipelineOptions
from e3pruner.pipelines.results import DENSE, recovery_results, search_results, speed_results, writing_results
from e3pruner.pipelines.stages import Stages
from e3pruner.precision import autocast_dtype
from e3pruner.recovery.compensation import Compensation
from e3pruner.recovery.state import going_on
from e3pruner.recovery.tracking import TRACKED
from e3pruner.surgery import PruningPlan
from e3pruner.surgery.plan import PLAN_FILE
from e3pruner.text.kinds import unseen_text
from e3pruner.text.sequences import Rows
from e3pruner.text.splits import Splits, batches, take, token_splits

CACHE, MEASURED, TRAINING = "cache", "measured", "training"
PRUNED, RECOVERED = "pruned", "recovered"


@dataclass(frozen=True)
class Work(Stages):
    """A run of `options` in a folder, with what it needs in memory. `judge`: the text that judges compensations;
    `unseen`: of a kind that no step sees."""

    options: PipelineOptions
    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    splits: Splits
    judge: Rows | None
    unseen: Tensor | None
    drop: int
    loading: float

    @classmethod
    def load(cls, options: PipelineOptions, folder: Path) -> Work:
        """Raises ValueError for a model, a text or a number of layers that does not fit."""
        began, name, trust = time.perf_counter(), str(options.model), options.trust_remote_code
        tokenizer = load_tokenizer(name, trust_remote_code=trust)
        dense = load_model(name, options.device, Dtype.FLOAT32, trust_remote_code=trust)
        check_unquantised("--model", dense, "to heal what is cut, name it dequantised; e3 prune cuts it as it is")
        layers = len(find_layers(dense))
        protected = check_indices("protect", options.protect, layers)
        drop = number_to_drop(dense, protected, drop=options.drop, fraction=options.fraction)
        check_drop(drop, layers, len(protected))
        if options.rounds > drop:
            raise ValueError(
                f"--rounds {options.rounds} must not exceed --drop {drop}: each round removes a layer at least"
            )
        parts = partial(token_splits, tokenizer, length=options.length, seed=options.seed)
        text = None if options.text is None else Path(options.text)
        splits = parts(text, teacher=dense if options.written else None)
        take(splits.calibration, options.sequences, "--sequences")
        take(splits.held_out, options.held_out, "--held-out")
        judge = (
            None
            if options.judge is None
            else parts(Path(options.judge), option="--judge").training[: options.sequences]
        )
        unseen = None
        if options.unseen is not None:
            given = (splits.training, splits.calibration)
            seen = [rows if isinstance(rows, Tensor) else rows.input_ids for rows in given]
            size = {"length": options.length, "held_out": options.held_out}
            unseen = unseen_text(tokenizer, str(options.unseen), seen=seen, **size)
        dtype = weights_dtype(name, Dtype(options.dtype), trust_remote_code=trust)
        return cls(
            folder=folder,
            dtype=dtype,
            options=options,
            dense=dense,
            tokenizer=tokenizer,
            splits=splits,
            judge=judge,
            unseen=unseen,
            drop=drop,
            loading=round(time.perf_counter() - began, 1),
        )

    @property
    def title(self) -> str:
        layers = len(find_layers(self.dense))
        name = "SmolLM2-135M-Instruct" if self.options.model == BUILT_IN else self.options.model
        return f"{name}, {layers} to {layers - self.drop} layers"

    @property
    def calibration(self) -> Rows:
        return take(self.splits.calibration, self.options.sequences, "--sequences")

    @property
    def held_out(self) -> list[Rows]:
        return batches(take(self.splits.held_out, self.options.held_out, "--held-out"), self.options.batch)

    def run(self) -> dict[str, Any]:
        """All stages in their order; the parts of the results that they give (see `e3pruner.report.results`)."""
        options, rounds = self.options, range(1, self.options.rounds + 1)
        layers = len(find_layers(self.dense))
        # The first search comes before all that takes long: it tells whether its options can be taken.
        first = self.stage("1-search", partial(self.search, 1, list(range(layers))))
        rivals = {name: self.stage(f"1-search-{name}", partial(self.rival, name)) for name in options.rivals}
        models = {DENSE: self.stage("1-evaluate-dense", lambda: self.evaluate(self.dense))}
        masks = {name: self.stage(f"1-evaluate-{name}", partial(self.judged, rivals[name])) for name in rivals}
        if options.cached:
            self.stage("1-teacher-cache", self.cache)
        kept, curves = list(range(layers)), []
        for number in rounds:
            found = first if number == 1 else self.stage(f"{number}-search", partial(self.search, number, kept))
            plan = PruningPlan(**found["plan"])
            kept = [kept[layer] for layer in plan.kept]
            self.stage(f"{number}-prune", partial(self.prune, number, plan))
            models[self.label(number, PRUNED)] = self.measured(number, PRUNED)
            curves.append(self.stage(f"{number}-recover", partial(self.recover, number, plan)))
            models[self.label(number, RECOVERED)] = self.measured(number, RECOVERED)
        final = PruningPlan(**first["plan"]) if options.rounds == 1 else self.whole(kept, layers)
        final.save(self.folder / PLAN_FILE)
        results = {
            **search_results(final),
            "device": str(self.dense.device),
            "rounds": curves,
            "recovery": curves[-1],
            "models": [{"name": name, **values} for name, values in models.items()],
        }
        if options.speed:
            found_speeds = self.stage("9-speeds", lambda: speeds(self.last())._asdict())
            results |= speed_results(results["models"], Speeds(**found_speeds))
        self.describe(final, results["models"], sum(len(curve["train"]) for curve in curves))
        if options.rivals or options.curve:
            found, figures = {options.method: first, **rivals}, {options.method: models[PRUNED], **masks}
            keys = ("removed", "order", "cost", "seconds")
            results["methods"] = [
                {"method": name, **{key: found[name][key] for key in keys}, **figures[name]} for name in found
            ]
        if options.curve:
            results["curve"] = self.stage("9-curve", partial(self.curve, found, figures))
        if options.writing:
            results |= self.stage("9-writing", self.write)
        if options.prompts:
            results["generations"] = self.stage("9-generate", self.generate)
        return results | {"seconds": {"0-load": self.loading, **self.seconds()}}

    def describe(self, plan: PruningPlan, models: list[dict[str, Any]], steps: int) -> None:
        """The plan and the card of what the last round leaves, trained for `steps` over all rounds."""
        source, settings = str(self.options.model), self.options.settings()
        trained = recovery_sentence(source, self.options.text, steps)
        for kind, recovered in ((PRUNED, ""), (RECOVERED, trained)):
            plan.save(self.folder / kind / PLAN_FILE)
            write_card(
                self.folder / kind,
                source,
                plan,
                "e3 run pipeline.yaml",
                settings=settings,
                recovered=recovered,
                figures=models,
            )

    def clean(self) -> None:
        """Deletes what only a resumed run would need."""
        self.clear()
        last = self.options.rounds
        names = [self.name(number, kind) for number in range(1, last) for kind in (PRUNED, RECOVERED)]
        for name in (*names, *(f"{TRAINING}-{number}" for number in range(1, last + 1)), CACHE):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for number in range(1, last + 1):
            (self.folder / f"{MEASURED}-{number}.json").unlink(missing_ok=True)

    def drops(self, number: int) -> int:
        """Layers that round `number`, from 1, removes: as even a share as whole layers allow."""
        return self.drop * number // self.options.rounds - self.drop * (number - 1) // self.options.rounds

    def name(self, number: int, kind: str) -> str:
        """The folder of a checkpoint; that of the last round has the plain name."""
        return kind if number == self.options.rounds else f"{kind}-{number}"

    def label(self, number: int, kind: str) -> str:
        """What the table calls the model of a round."""
        return kind if self.options.rounds == 1 else f"{kind}, round {number}"

    def whole(self, kept: list[int], layers: int) -> PruningPlan:
        """The plan of all rounds together."""
        removed = sorted(set(range(layers)) - set(kept))
        return PruningPlan(
            kept, removed, self.options.method, self.options.seed, model_type=self.dense.config.model_type
        )

    def load_checkpoint(self, number: int, kind: str) -> PreTrainedModel:
        return load_model(
            str(self.folder / self.name(number, kind)),
            str(self.dense.device),
            Dtype.FLOAT32,
            trust_remote_code=self.options.trust_remote_code,
        )

    def start(self, number: int) -> PreTrainedModel:
        """What round `number` prunes."""
        return self.dense if number == 1 else self.load_checkpoint(number - 1, RECOVERED)

    def cache(self) -> None:
        temperature = self.options.recover.get("temperature", 1.0)
        e3pruner.cache_teacher(
            self.dense, self.splits.training, self.folder / CACHE, tokenizer=self.tokenizer, temperature=temperature
        )

    def search(self, number: int, kept: list[int]) -> dict[str, Any]:
        """The plan of a round, whose model has the layers `kept` of the dense one."""
        protect = [kept.index(layer) for layer in self.options.protect]
        options = self.options.search
        return self.searched(self.start(number), number, self.drops(number), self.options.method, protect, options)

    def rival(self, method: str) -> dict[str, Any]:
        """What another method takes away from the dense model at once."""
        return self.searched(self.dense, 1, self.drop, method, self.options.protect, {})

    def searched(
        self,
        model: PreTrainedModel,
        number: int,
        drop: int,
        method: str,
        protect: list[int],
        options: dict[str, Any],
    ) -> dict[str, Any]:
        # One file for all methods of a round: a mask measured for one is known to the next.
        checkpoint, began = self.folder / f"{MEASURED}-{number}.json", time.perf_counter()
        rows = batches(self.calibration, self.options.batch)
        plan = e3pruner.search(model, rows, drop, method, self.options.seed, protect, checkpoint=checkpoint, **options)
        seconds = round(time.perf_counter() - began, 1)
        figures = {"removed": plan.removed, "order": order(plan), "cost": plan.metrics["cost"], "seconds": seconds}
        return {"plan": asdict(plan), **figures}

    def judged(self, found: dict[str, Any]) -> dict[str, Any]:
        """Held-out figures of a mask."""
        plan = PruningPlan(**found["plan"])
        return self.evaluate(e3pruner.prune(self.dense, plan, copy_weights=False))

    def prune(self, number: int, plan: PruningPlan) -> dict[str, Any]:
        """Cuts and compensates; the method that was chosen, and the KL of each that was tried."""
        start, options = self.start(number), self.options
        pruned, found = e3pruner.prune(start, plan), Compensation("none", {})
        if options.compensate != found.method:
            found = e3pruner.compensate(
                pruned, start, plan, self.calibration, judge=self.judge, method=options.compensate
            )
        self.export(pruned, self.tokenizer, self.name(number, PRUNED))
        return asdict(found)

    def recover(self, number: int, plan: PruningPlan) -> dict[str, Any]:
        student, training = self.load_checkpoint(number, PRUNED), self.folder / f"{TRAINING}-{number}"
        result = e3pruner.distill(
            student,
            teacher=e3pruner.TeacherCache(self.folder / CACHE) if self.options.cached else self.dense,
            data=self.splits.training,
            held_out=self.held_out,
            plan=plan,
            **going_on(training),
            track=self.options.track,
            track_folder=self.folder / TRACKED / f"round-{number}",
            **self.options.distill_options(),
        )
        self.export(student, self.tokenizer, self.name(number, RECOVERED))
        recovered: dict[str, Any] = recovery_results(result)["recovery"]
        return recovered

    def measured(self, number: int, kind: str) -> dict[str, Any]:
        return self.stage(f"{number}-evaluate-{kind}", lambda: self.evaluate(self.load_checkpoint(number, kind)))

    def evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        figures = e3pruner.evaluate(model, self.held_out, self.dense, precision="auto")
        if self.unseen is None:
            return figures
        rows = batches(self.unseen, self.options.batch)
        elsewhere = e3pruner.evaluate(model, rows, self.dense, precision="auto")
        return figures | {f"unseen_{name}": elsewhere[name] for name in ("kl", "perplexity")}

    def last(self) -> dict[str, PreTrainedModel]:
        """The dense model, and those of the last round, as the table calls them."""
        number = self.options.rounds
        return {
            DENSE: self.dense,
            **{self.label(number, kind): self.load_checkpoint(number, kind) for kind in (PRUNED, RECOVERED)},
        }

    def write(self) -> dict[str, Any]:
        wanted = brief_writing(self.dense, self.tokenizer, self.options.writing, self.options.seed)
        return {} if wanted is None else writing_results(self.last(), self.tokenizer, **wanted)

    def generate(self) -> list[dict[str, Any]]:
        models = self.last()
        return [
            {"prompt": prompt, "answers": {name: self.answer(model, prompt) for name, model in models.items()}}
            for prompt in self.options.prompts
        ]

    def answer(self, model: PreTrainedModel, prompt: str) -> str:
        ids = continue_prompt(model, self.tokenizer, prompt, self.options.new_tokens)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def curve(self, found: dict[str, Any], models: dict[str, Any]) -> dict[str, list[list[float]]]:
        """Held-out KL without each method's first choices: some numbers of layers, and `drop` as in `models`."""
        points = self.options.curve
        counts = sorted({math.ceil(self.drop * point / points) for point in range(1, points)} - {self.drop})
        precision = autocast_dtype("auto", self.dense.device)
        text, units = Calibration(self.held_out, self.dense.device), units_of(self.dense, self.drop)
        with SearchProblem(self.dense, text, units=units, dtype=precision) as problem:
            masks = {(m, n): problem.mask(mask["order"][:n]) for m, mask in found.items() for n in counts}
            figures = held_out_figures(problem, list(masks.values()))
        values = {point: each["kl"] for point, each in zip(masks, figures, strict=True)}
        return {
            method: [*([n, values[method, n]] for n in counts), [self.drop, models[method]["kl"]]] for method in found
        }


def order(plan: PruningPlan) -> list[int]:
    """The layers from the first to go to the last: what the search removes, then the others, by its final values."""
    kinds = ("logits", "importance")
    values = next((record[key] for record in reversed(plan.history) for key in kinds if key in record), None)
    if values is None:  # a fixed pattern values no layer
        values = [0.0] * plan.num_layers
    return sorted(range(plan.num_layers), key=lambda layer: (layer not in plan.removed, values[layer], -layer))
