"""The question every search method answers: which layers may go at the least Kullback-Leibler divergence?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import groupby, islice
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from e3kernels.profiling import named_range
from e3pruner.evaluation.figures import Divergences, cross_entropies, divergences
from e3pruner.mask_search.account import Account, PassCosts
from e3pruner.mask_search.calibration import Calibration
from e3pruner.mask_search.measurements import Measurements
from e3pruner.mask_search.method import Progress
from e3pruner.mask_search.units import Units
from e3pruner.models import output_head
from e3pruner.models.skipping_forward import Mask, SkippingForward, shared_prefixes
from e3pruner.models.stack import evaluating
from e3pruner.models.streaming import computing_in
from e3pruner.text.sequences import Sequences

_COUNTS = {"kl": "counted", "nll": "predicted"}


class SearchProblem:
    """A model, its calibration text, what shall go, and an account of what has been spent.

    `score` is the one measure: the mean over tokens of KL(dense model || model without the layers), in nats, over the
    full vocabulary, forward only, as `divergences` computes it.

    Under `torch.distributed` values are averaged over the tokens of all ranks before anything is decided, so all of
    them take the same way; that they are about to measure the same masks is checked each time, and a mismatch raises
    `RuntimeError`.

    Used as a context manager: inside, the model is in evaluation mode, its weights are rounded to `dtype` (None: they
    are not); leaving restores it.

    Everything measured is kept in `measurements`. A search method is a deterministic function of its seed and of what
    it measures; given the measurements of an interrupted run it comes back to where that run was, without computing,
    and goes on to the same result, bit for bit. `progress` hears of every pass.

    `masks_at_once` bounds the hidden states that exist at a time and `prefixes_per_call` says how many share a call of
    a layer, see `SkippingForward`; the rounding, and with it what is measured, depends on the second.

    `account` counts dense forward passes times tokens: each layer run, and each use of the output head, with its share
    of the parameters; a backward pass that stops at hidden states counts as much as the forward pass, one that reaches
    the weights twice. What a method asks for twice is paid for once, what was measured before it began is paid for too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Calibration,
        *,
        units: Units,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        measurements: Measurements | None = None,
        progress: Progress | None = None,
        divergences: Divergences = divergences,
        masks_at_once: int | None = None,
        prefixes_per_call: int = 1,
    ) -> None:
        self.model = model
        self.calibration = calibration
        self.batches = calibration.batches
        self.units = units
        self.free = units.free
        self.drop = sum(count for _, count in units.groups)
        self.seed = seed
        self.measurements = Measurements() if measurements is None else measurements
        self.account = Account()
        self.forward = SkippingForward(
            model,
            sublayers=units.units_per_layer == 2,
            masks_at_once=masks_at_once,
            prefixes_per_call=prefixes_per_call,
        )
        self.num_layers = len(self.forward.layers)
        self.head = output_head(model)
        self.costs = PassCosts.of(self.forward.layers, self.head.weight.numel(), units.units_per_layer)
        self._progress = Progress() if progress is None else progress
        self.expect = self._progress.expect
        self._divergences = divergences
        self._masks_at_once = masks_at_once
        self._dtype = dtype
        self._context = ExitStack()

    def __enter__(self) -> Self:
        self._context.enter_context(evaluating(self.model))
        self._context.enter_context(torch.no_grad())
        self._context.enter_context(computing_in(self.model, self._dtype))
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.close()

    def mask(self, removed: Sequence[int]) -> Mask:
        """The mask that lacks the units `removed`."""
        gone = set(removed)
        return tuple(unit not in gone for unit in range(self.units.count))

    def rows(self, batch: int) -> Sequences:
        """One batch, where the model is."""
        return self.batches[batch].to(self.head.weight.device)

    def states(self, batch: int) -> list[Tensor]:
        """The input of every layer and the output of the last, (B, T, H) each, of the dense model on one batch."""
        began = time.perf_counter()
        states, last = self.forward.states(self.rows(batch).inputs)
        self.measurements.teacher[batch] = last.flatten(0, 1)
        self.measurements.seconds.setdefault(f"dense {batch}", time.perf_counter() - began)
        return states

    def teacher_of(self, batch: int) -> Tensor:
        """The dense model's last hidden state (N, H) of one batch."""
        if batch not in self.measurements.teacher:
            with named_range("teacher forward"):
                self.states(batch)
        return self.measurements.teacher[batch]

    def _teachers_of(self, batches: Sequence[int]) -> None:
        """Sees to the dense model's last hidden states of `batches`, all in one walk through the layers."""
        missing = [batch for batch in batches if batch not in self.measurements.teacher]
        if len(missing) < 2:
            for batch in missing:
                self.teacher_of(batch)
            return
        began = time.perf_counter()
        inputs = [self.rows(batch).inputs for batch in missing]
        with named_range("teacher forward"):
            ((_, hiddens),) = self.forward.last_hiddens(inputs, [self.mask([])])
        took = (time.perf_counter() - began) / len(missing)
        for batch, hidden in zip(missing, hiddens, strict=True):
            self.measurements.teacher[batch] = hidden.flatten(0, 1)
            self.measurements.seconds.setdefault(f"dense {batch}", took)

    def score(self, masks: Sequence[Mask], batches: Sequence[int] | None = None, measure: str = "kl") -> list[float]:
        """Mean KL per token, in nats, of each mask over the batches with these numbers (all of them unless told).

        With `measure` "nll" it is the mean negative log-likelihood of the text, the log of the perplexity, instead.

        Raises `FloatingPointError` naming the mask for which it is not finite.
        """
        chosen = range(len(self.batches)) if batches is None else batches
        tokens = [self.batches[batch].input_ids.numel() for batch in chosen]
        for group in self.forward.groups(tokens, min(len(masks), self._masks_at_once or len(masks)) or 1):
            self._measure_unknown(measure, masks, [chosen[each] for each in group])
        table = [self._scores(measure, masks, batch) for batch in chosen]
        return self.calibration.mean(table, chosen, _COUNTS[measure])

    def measure(
        self,
        key: str,
        batch: int,
        compute: Callable[[int], list[float]],
        *,
        over: str = "counted",
        layer_passes: float = 0,
        heads: float = 0,
    ) -> list[float]:
        """`compute(batch)`, means over the batch's tokens, kept under `key`; beside the dense pass of the batch it
        costs as much as `layer_passes` passes through all layers and `heads` uses of the output head.

        `over`: which tokens the means are over, "counted" or "predicted" (see `Sequences`).

        Raises `FloatingPointError` naming `key` if a value is not finite.
        """
        if key not in self.measurements.measured:
            began = time.perf_counter()
            self.calibration.ranks.check_equal("the measurements", key)
            values = self.calibration.over_ranks(compute(batch), batch, over)
            if not all(map(math.isfinite, values)):
                raise FloatingPointError(f"what was measured as {key!r} is not finite: {values}")
            self.measurements.add({key: values}, {key: time.perf_counter() - began})
            self._progress.advance()
        self._pay_dense(batch)
        self._pay(key, batch, layer_passes * self.costs.stack + heads * self.costs.head)
        return self.measurements.measured[key]

    def _scores(self, measure: str, masks: Sequence[Mask], batch: int) -> list[float]:
        """The measured mean of `measure` on one batch under each mask, paid for."""
        if measure == "kl":
            self._pay_dense(batch)
        owed = [mask for mask in masks if self.account.owes(_key(measure, batch, mask))]
        for mask, shared in shared_prefixes(owed):
            self._pay(_key(measure, batch, mask), batch, self.costs.of_mask(mask, shared))
        return [self.measurements.measured[_key(measure, batch, mask)][0] for mask in masks]

    def _measure_unknown(self, measure: str, masks: Sequence[Mask], batches: Sequence[int]) -> None:
        """Measures what is not known yet, batches of which as much is missing together."""

        def unknown(batch: int) -> tuple[Mask, ...]:
            return tuple(mask for mask in masks if _key(measure, batch, mask) not in self.measurements.measured)

        for missing, alike in groupby(batches, unknown):
            if missing:
                self._measure_masks(measure, missing, list(alike))

    def _measure_masks(self, measure: str, masks: Sequence[Mask], batches: list[int]) -> None:
        """Measures all masks on all batches; the time that it took is shared by what each mask ran."""
        if measure == "kl":
            self._teachers_of(batches)
        began = time.perf_counter()
        self.calibration.ranks.check_equal("the masks", [measure, batches, [list(mask) for mask in masks]])
        own = self._on_this_rank(measure, masks, batches)
        found = {}
        for number, batch in enumerate(batches):
            means = [of_batches[number] for of_batches in own.values()]
            for mask, value in zip(own, self.calibration.over_ranks(means, batch, _COUNTS[measure]), strict=True):
                self._check_finite(measure, value, mask, batch)
                found[_key(measure, batch, mask)] = [value]
        took, sizes = time.perf_counter() - began, self.calibration.sizes["text"]
        work = {
            _key(measure, batch, mask): sizes[batch] * self.costs.of_mask(mask, shared)
            for mask, shared in shared_prefixes(masks)
            for batch in batches
        }
        self.measurements.add(found, {key: took * each / sum(work.values()) for key, each in work.items()})

    def _check_finite(self, measure: str, value: float, mask: Mask, batch: int) -> None:
        if not math.isfinite(value):
            removed = [unit for unit, runs in enumerate(mask) if not runs]
            what = "layers" if self.units.units_per_layer == 1 else "sub-layers"
            raise FloatingPointError(f"the {measure.upper()} is {value} on batch {batch} without {what} {removed}")

    def _on_this_rank(self, measure: str, masks: Sequence[Mask], batches: list[int]) -> dict[Mask, list[float]]:
        """The mean of `measure` over this rank's tokens of each batch under each mask."""
        rows = [self.rows(batch) for batch in batches]
        coming = self.forward.last_hiddens([each.inputs for each in rows], masks)
        found: dict[Mask, list[float]] = {}
        while students := dict(islice(coming, self._masks_at_once or len(masks))):
            with named_range("loss"):
                means = [
                    self._compare(measure, [hiddens[number] for hiddens in students.values()], rows[number], batch)
                    for number, batch in enumerate(batches)
                ]
            found.update(zip(students, map(list, zip(*means, strict=True)), strict=True))
            for _ in range(len(students) * len(batches)):
                self._progress.advance()
            del students  # before the next ones come
        return found

    def _compare(self, measure: str, students: list[Tensor], rows: Sequences, batch: int) -> list[float]:
        """The mean of `measure` of each of `students`, last hidden states (B, T, H)."""
        if measure == "nll":
            return cross_entropies(self.head, rows.predicted, [rows.at_predicted(each) for each in students])
        teacher = rows.at_counted(self.teacher_of(batch))
        return self._divergences(self.head, teacher, [rows.at_counted(each.flatten(0, 1)) for each in students])

    def _pay_dense(self, batch: int) -> None:
        self._pay(f"dense {batch}", batch, self.costs.stack)

    def _pay(self, key: str, batch: int, passes: float) -> None:
        tokens = self.calibration.sizes["text"][batch]
        self.account.pay(key, passes * tokens, self.measurements.seconds.get(key, 0.0))


def _key(measure: str, batch: int, mask: Mask) -> str:
    return f"{measure} {batch} {''.join('01'[runs] for runs in mask)}"
