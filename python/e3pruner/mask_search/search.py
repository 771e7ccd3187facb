"""`search`: check everything, run one method, return its plan."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from math import isfinite
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from transformers import PreTrainedModel

from e3pruner.evaluation.target import number_to_drop
from e3pruner.mask_search.calibration import Calibration
from e3pruner.mask_search.healed import RUNGS, Healing, heal
from e3pruner.mask_search.measurements import Checkpoint, Measurements
from e3pruner.mask_search.method import METHODS, Method, Progress, Search
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.ranks import Ranks
from e3pruner.mask_search.study import Study
from e3pruner.mask_search.units import Units, units_of
from e3pruner.models import find_layers, output_head
from e3pruner.models.device import rounded_dtype
from e3pruner.models.identity import model_identity
from e3pruner.models.stack import check_indices
from e3pruner.surgery import PruningPlan
from e3pruner.surgery.config import pruned_config
from e3pruner.surgery.in_memory import skeleton
from e3pruner.text.given import Given, batches_of
from e3pruner.vocabulary import check_choice, check_integer, check_options, did_you_mean

OBJECTIVES = ("raw", "healed")


def search(
    model: PreTrainedModel,
    token_batches: Given,
    drop: int | None = None,
    method: str = "gumbel-topk",
    seed: int = 0,
    protect: Iterable[int] = (),
    *,
    fraction: float | None = None,
    granularity: str = "layer",
    quota: Mapping[str, int] | str | None = None,
    precision: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    masks_at_once: int | None = None,
    prefixes_per_call: int = 1,
    objective: str = "raw",
    training: Given | None = None,
    rungs: str = RUNGS,
    recover: Mapping[str, Any] | None = None,
    **options: Any,
) -> PruningPlan:
    """Search the decoder layers whose removal changes the predictions of `model` least.

    model: a Hugging Face causal language model; afterwards it is as it was, whatever happens.
    token_batches: calibration text: a list of batches, or one. A batch is token ids (B, T), a mapping with `input_ids`
        and where wanted `attention_mask`, `labels` and `position_ids`, a tuple (`input_ids`, `attention_mask`), or
        `e3pruner.text.Sequences`. Padding counts in nothing; of labelled text only what is to be predicted counts.
    drop: how many layers go: 8, or all of `quota`, unless told. fraction: their share of all layers, instead of `drop`.
    method: one of `METHODS`; `options` are that method's keyword arguments.
    seed: of all randomness; (seed, tokens, model) decide the plan.
    protect: layers that stay whole.
    granularity: "layer", or "sublayer": then attentions and MLPs go one by one, and `drop` and
        `fraction` count them.
    quota: how many go of each kind: of the configuration's `layer_types`, or of "attention" and "mlp"; they add up to
        `drop`. Or "llama.cpp", "SGLang" or "vLLM": what stays keeps to the kinds that this engine fixes by index.
    precision: "fp32" computes in the type of the weights, "bf16" with the weights rounded to bfloat16 meanwhile, "auto"
        in bf16 where the processor multiplies it.
    checkpoint: a file for what has been measured. It is written every few seconds and when the search stops, by
        whatever cause; the same call with the same file goes on from there and ends with the same plan, bit for bit.
        What one method has measured, another need not measure again on the same tokens; its `cost` counts it all the
        same.
    progress: show a bar on standard error.
    masks_at_once: how many masks of a step are computed together: about two hidden states of each exist at a time, and
        the model's layers are entered once for so many masks. All of a step unless told; the plan is the same.
    prefixes_per_call: how many hidden states are concatenated for one call of a layer. More than 1 pay off where
        reading the weights costs more than multiplying by them; what is measured is rounded differently.

    objective: "raw": the mask that changes the predictions least as the model is cut; "healed": the mask that does so
        after a short recovery, of those that the method finds best and of runs of neighbouring layers.
    training: with "healed", the text to recover on; none of it may be calibration text, which judges. Ranks share it.
    rungs: with "healed", "MASKSxTOKENS,...": so many masks are recovered on so many tokens, the best of them, and what
        they promise, on more. What that costs is said before it begins.
    recover: with "healed", options of `e3pruner.distill` for these recoveries; one sequence per step and `precision`
        unless told.

    Under `torch.distributed` every rank calls this with the same arguments but its own share of each batch, and gets
    the same plan; rank 0 writes the checkpoint and shows the bar. Where one rank's share is refused, all raise.
    Recoveries are shared out, one mask per rank.

    Returns the plan. Its `history` holds one record per step (see `method.Search`) with "step" and "cost", the dense
    forward passes times tokens up to there; its `metrics` the calibration "tokens", the mean "kl" of the final mask on
    them in nats per token, and the "cost" of the search; after recoveries "healed_kl" on them, and
    "healed_tokens", those of the last rung.

    Raises `ValueError` or `TypeError` naming the argument before anything is computed, and `FloatingPointError` naming
    the step if a divergence is not finite.
    """
    num_layers = len(find_layers(model))
    protected = check_indices("protect", protect, num_layers)
    one_by_one = granularity == "sublayer"
    counts = quota if isinstance(quota, Mapping) else None
    count = number_to_drop(model, protected, quota=counts, sublayers=one_by_one, drop=drop, fraction=fraction)
    units = units_of(model, count, protected, granularity, quota)
    try_surgery(model, units)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r} must be an integer from 0 to 2**63 - 1")
    run = find_method(method, options)
    _check_fit(run, granularity, counts)
    if masks_at_once is not None:
        check_integer("masks_at_once", masks_at_once, 1)
    check_integer("prefixes_per_call", prefixes_per_call, 1)
    healing = None
    check_choice("objective", objective, OBJECTIVES)
    if objective == "healed":
        healing = Healing.of(model, training, rungs, recover, precision)
    elif training is not None or recover is not None:
        raise ValueError(f"training and recover are of objective='healed', not {objective!r}")
    calibration = _calibration(model, token_batches)
    dtype = rounded_dtype(model, precision, calibration.batches[0].with_extras)
    ranks = calibration.ranks
    ranks.check_equal(
        "the arguments",
        [
            asdict(units) | {"demands": [str(demand) for demand in units.demands]},
            method,
            seed,
            str(dtype),
            prefixes_per_call,
            options,
            None if healing is None else [healing.training.identity, healing.rungs, healing.recover],
        ],
    )
    known = Measurements()
    if checkpoint is not None:
        # What is measured depends on all of it: is rounded by dtype and prefixes_per_call.
        of = {"dtype": str(dtype), "model": model_identity(model), "prefixes_per_call": prefixes_per_call}
        known = _known(checkpoint, calibration, of)
    bar = _Bar(method) if progress and ranks.first else None
    problem = SearchProblem(
        model,
        calibration,
        units=units,
        seed=seed,
        dtype=dtype,
        measurements=known,
        progress=bar,
        masks_at_once=masks_at_once,
        prefixes_per_call=prefixes_per_call,
    )
    if healing is not None and progress and ranks.first:
        Console(stderr=True, highlight=False).print(healing.said(problem))
    healed: dict[str, Any] = {}
    try:
        with problem, bar or nullcontext():
            history, removed = run_search(problem, run(problem, **options))
            study = None if healing is None else Study.of_measured(problem)
        if healing is not None and study is not None:
            for record in heal(study, _ends(history, removed), healing):
                history.append({"step": len(history), "cost": problem.account.cost, **record})
                removed = record["removed"]
                healed = {"healed_kl": min(record["healed"]), "healed_tokens": record["tokens"]}
        cost = problem.account.cost
        with problem:
            (kl,) = problem.score([problem.mask(removed)])
    finally:
        if isinstance(known, Checkpoint):
            known.save()
    metrics = {"kl": kl, "tokens": calibration.tokens, "cost": cost, **healed}
    layers, sublayers = units.removed(removed)
    return PruningPlan.of_removed(
        layers,
        num_layers,
        sublayers=sublayers,
        method=method,
        seed=seed,
        model_type=model.config.model_type,
        history=history,
        metrics=metrics,
    )


def _ends(history: Sequence[Mapping[str, Any]], removed: list[int]) -> list[list[int]]:
    """The masks that a search ended with, as units: its choice, then what stood against it."""
    rivals = [sorted(units) for record in reversed(history) for units in record.get("finalists", [])]
    steps = [sorted(record["removed"]) for record in reversed(history) if len(record["removed"]) == len(removed)]
    return [list(units) for units in dict.fromkeys(map(tuple, [removed, *rivals, *steps]))]


def _calibration(model: PreTrainedModel, token_batches: Given) -> Calibration:
    columns = output_head(model).weight.shape[0]
    batches = Ranks(model.device).together(
        "token_batches", lambda: batches_of("token_batches", token_batches, columns, model=model)
    )
    return Calibration(batches, model.device)


def _known(path: str | os.PathLike[str], calibration: Calibration, of: dict[str, Any]) -> Measurements:
    """What the file of rank 0 knows of these tokens, on every rank; on the first it is kept in the file."""
    store = Checkpoint(path, {"tokens": calibration.identity, **of})
    known = calibration.ranks.from_first((store.measured, store.seconds))
    return store if calibration.ranks.first else Measurements(*known)


def run_search(problem: SearchProblem, running: Search) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a search and the layers it removes, ascending; `problem` is entered. See `search` for errors."""
    history: list[dict[str, Any]] = []
    while True:
        try:
            record = next(running)
        except StopIteration as stop:
            return history, sorted(stop.value)
        except FloatingPointError as error:
            raise FloatingPointError(f"search step {len(history)}: {error}") from error
        if "importance" in record:  # of a layer that must stay there is none
            record["importance"] = [value if isfinite(value) else None for value in record["importance"]]
        history.append({"step": len(history), "cost": problem.account.cost, **record})


def find_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of this name. Raises `ValueError` if there is none, `TypeError` for an option that it does not have or
    a value of another type.
    """
    if name not in METHODS:
        raise ValueError(
            f"method={name!r} is not known{did_you_mean(name, METHODS)}; it is one of {', '.join(METHODS)}"
        )
    check_options(f"method={name!r}", options, METHODS[name])
    return METHODS[name]


def try_surgery(model: PreTrainedModel, units: Units) -> None:
    """Raises `ValueError` if a plan of the deepest units, or of the first, cannot be cut, as far as it can be known
    without running the model."""
    for values in ([0.0] * units.count, [float(unit) for unit in range(units.count)]):
        gone = units.removed(units.cheapest(values) or ())[0]
        kept = [layer for layer in range(units.count // units.units_per_layer) if layer not in gone]
        if getattr(model, "is_quantized", False):  # built anew it would have the modules of the dequantised model
            pruned_config(model.config, kept)
        else:
            skeleton(model, kept)


def _check_fit(method: Method, granularity: str, quota: Mapping[str, int] | None) -> None:
    if granularity == "sublayer" and not method.sublayers:
        able = ", ".join(name for name in METHODS if METHODS[name].sublayers)
        raise ValueError(f"granularity='sublayer': {method.name} removes layers; use one of {able}")
    if quota is not None and not method.quotas:
        able = ", ".join(name for name in METHODS if METHODS[name].quotas)
        raise ValueError(f"quota: {method.name} takes no account of kinds; use one of {able}")


class _Bar(Progress):
    """A bar over the passes that the method expects, which is at most; it ends full."""

    def __init__(self, method: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = ProgressBar(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(f"search: {method}", total=None)

    def expect(self, passes: int) -> None:
        self._bar.update(self._task, total=passes)

    def advance(self) -> None:
        self._bar.advance(self._task)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self._bar.update(self._task, total=self._bar.tasks[self._task].completed)
        self._bar.stop()
