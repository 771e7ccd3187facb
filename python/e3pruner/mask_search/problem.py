"""The question every search method answers: which layers may go at the least Kullback-Leibler divergence?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import e3kernels as e3k
from e3kernels.profiling import named_range
from e3pruner.mask_search.account import Account
from e3pruner.mask_search.ranks import Ranks
from e3pruner.mask_search.units import Units
from e3pruner.models import output_head
from e3pruner.models.skipping_forward import Mask, SkippingForward, shared_prefixes
from e3pruner.models.stack import evaluating
from e3pruner.models.sublayers import attention_of
from e3pruner.precision import weights_in
from e3pruner.text.sequences import Rows, Sequences, as_sequences

_PASS_TOKENS = 512  # of one forward pass: enough to tell good masks from bad ones, so that a step need not cost more
_COUNTS = {"kl": "counted", "nll": "predicted"}
_TILE_LOGITS = 1 << 24  # of one model that exist at a time


class SearchProblem:
    """A model, its calibration tokens, what shall go, and an account of what has been spent.

    `score` is the one measure: the mean over tokens of KL(dense model || model without the layers), in nats, over the
    full vocabulary, forward only. `batches` are the given ones, (B, T) each, split so that a forward pass is short.
    Of batches with labels only the positions that predict one count, of padded ones those that are no padding.

    Under `torch.distributed` each rank has its own share of every batch, as large as the others'. Values are averaged
    over the tokens of all ranks before anything is decided, so all of them take the same way; that they are about to
    measure the same masks is checked each time, and a mismatch raises `RuntimeError`. A pass is as long over all ranks
    as on one.

    Used as a context manager: inside, the model is in evaluation mode, its weights are rounded to `dtype` (None: they
    are not); leaving restores it.

    Everything measured is kept in `measured`, and how long it took in `seconds`. A search method is a deterministic
    function of its seed and of what it measures; given the `measured` of an interrupted run it comes back to where that
    run was, without computing, and goes on to the same result, bit for bit. `teacher` keeps the dense model's last
    hidden state (N, H) of the batches it has seen; problems on the same tokens may share all three.

    `masks_at_once` bounds the hidden states that exist at a time and `prefixes_per_call` says how many share a call of
    a layer, see `SkippingForward`; the rounding, and with it `measured`, depends on the second.

    `account` counts dense forward passes times tokens: each layer run, and each use of the output head, with its share
    of the parameters; a backward pass that stops at hidden states counts as much as the forward pass, one that reaches
    the weights twice. What a method asks for twice is paid for once, what was `measured` before it began is paid for
    too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Rows],
        *,
        units: Units,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        masks_at_once: int | None = None,
        prefixes_per_call: int = 1,
    ) -> None:
        self.model = model
        self.ranks = Ranks(model.device)
        length = max(1, _PASS_TOKENS // self.ranks.count)
        given = [part for batch in batches for part in as_sequences(batch).split(max(1, length // batch.shape[1]))]
        self.batches = [part.trimmed() for part in given]
        self.units = units
        self.free = units.free
        self.drop = sum(count for _, count in units.groups)
        self.seed = seed
        self.masks_at_once = masks_at_once
        self.forward = SkippingForward(
            model,
            sublayers=units.units_per_layer == 2,
            masks_at_once=masks_at_once,
            prefixes_per_call=prefixes_per_call,
        )
        self.num_layers = len(self.forward.layers)
        self.head = output_head(model)
        self.measured: dict[str, list[float]] = {}
        self.seconds: dict[str, float] = {}
        self.teacher: dict[int, Tensor] = {}
        self.account = Account()
        self.expect: Callable[[int], None] = lambda passes: None
        self.advance: Callable[[], None] = lambda: None
        self.committed: Callable[[], None] = lambda: None
        self._dtype = dtype
        self._context = ExitStack()
        self.ranks.check_equal("the batches (their number and shapes)", [list(part.shape) for part in given])
        kinds = {"text": [int(part.text.sum()) for part in self.batches]}
        kinds["counted"] = [int(part.counted.sum()) for part in self.batches]
        kinds["predicted"] = [len(part.predicted) for part in self.batches]
        # Tokens of each batch: of this rank, and of all.
        self._own = kinds
        self._all = {kind: [int(total) for total in self.ranks.sum(sizes)] for kind, sizes in kinds.items()}
        self._unit_costs, self._head_cost = _costs(self.forward.layers, self.head.weight.numel(), units.units_per_layer)

    def __enter__(self) -> Self:
        self._context.enter_context(evaluating(self.model))
        self._context.enter_context(torch.no_grad())
        self._context.enter_context(weights_in(self.model.parameters(), self._dtype))
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.close()

    @property
    def tokens(self) -> int:
        """Calibration tokens whose predictions count."""
        return sum(self._all["counted"])

    def mask(self, removed: Sequence[int]) -> Mask:
        """The mask that lacks the units `removed`."""
        gone = set(removed)
        return tuple(unit not in gone for unit in range(self.units.count))

    def rows(self, batch: int) -> Sequences:
        """One batch, where the model is."""
        return self.batches[batch].to(self.head.weight.device)

    def score(self, masks: Sequence[Mask], batches: Sequence[int] | None = None, measure: str = "kl") -> list[float]:
        """Mean KL per token, in nats, of each mask over the batches with these numbers (all of them unless told).

        With `measure` "nll" it is the mean negative log-likelihood of the text, the log of the perplexity, instead.

        Raises `FloatingPointError` naming the mask for which it is not finite.
        """
        chosen = range(len(self.batches)) if batches is None else batches
        return self.mean([self._scores(measure, masks, batch) for batch in chosen], chosen, _COUNTS[measure])

    def state_distance(self, span: int, measure: Callable[[Tensor], Tensor]) -> list[float]:
        """Mean of `measure`(cos) over the calibration tokens, for each of the L − span + 1 runs of `span` layers.

        cos, in fp32, is that of the angle between what enters the run and what leaves it.
        """

        def distances(batch: int) -> list[float]:
            rows = self.rows(batch)
            states = [rows.at_counted(state.flatten(0, 1)).float() for state in self._dense(batch)]
            cosines = [torch.cosine_similarity(a, b, dim=-1) for a, b in zip(states, states[span:], strict=False)]
            return [measure(cosine).mean().item() for cosine in cosines]

        numbers = range(len(self.batches))
        name = f"{measure.__name__} {span}"
        return self.mean([self.measure(f"{name} {batch}", batch, distances) for batch in numbers], numbers)

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
        if key not in self.measured:
            began = time.perf_counter()
            self.ranks.check_equal("the measurements", key)
            values = self._over_ranks(compute(batch), batch, over)
            if not all(map(math.isfinite, values)):
                raise FloatingPointError(f"what was measured as {key!r} is not finite: {values}")
            self._keep({key: values}, {key: time.perf_counter() - began})
            self.advance()
        self._pay_dense(batch)
        self._pay(key, batch, layer_passes * sum(self._unit_costs) + heads * self._head_cost)
        return self.measured[key]

    def teacher_of(self, batch: int) -> Tensor:
        """The dense model's last hidden state (N, H) of one batch."""
        if batch not in self.teacher:
            with named_range("teacher forward"):
                self._dense(batch)
        return self.teacher[batch]

    def mean(self, table: list[list[float]], batches: Sequence[int], over: str = "counted") -> list[float]:
        """The mean of the rows of `table`, one for each of `batches`, weighted by their tokens: those that are
        "counted" or "predicted"."""
        sizes = [self._all[over][batch] for batch in batches]
        shares = [size / sum(sizes) for size in sizes]
        return [sum(a * b for a, b in zip(shares, column, strict=True)) for column in zip(*table, strict=True)]

    def _dense(self, batch: int) -> list[Tensor]:
        """The input of every layer and the output of the last; the last hidden state stays as the teacher's."""
        began = time.perf_counter()
        states, last = self.forward.states(self.rows(batch).inputs)
        self.teacher[batch] = last.flatten(0, 1)
        self.seconds.setdefault(f"dense {batch}", time.perf_counter() - began)
        return states

    def _scores(self, measure: str, masks: Sequence[Mask], batch: int) -> list[float]:
        keys = {mask: f"{measure} {batch} {''.join('01'[runs] for runs in mask)}" for mask in masks}
        if unknown := [mask for mask, key in keys.items() if key not in self.measured]:
            if measure == "kl":
                self.teacher_of(batch)
            began = time.perf_counter()
            values = self._measure(measure, unknown, batch)
            took = time.perf_counter() - began
            work = {mask: self._work(mask, shared) for mask, shared in shared_prefixes(unknown)}
            seconds = {keys[mask]: took * work[mask] / sum(work.values()) for mask in unknown}
            self._keep({keys[mask]: [value] for mask, value in values.items()}, seconds)
        if measure == "kl":
            self._pay_dense(batch)
        owed = [mask for mask, key in keys.items() if self.account.owes(key)]
        for mask, shared in shared_prefixes(owed):
            self._pay(keys[mask], batch, self._work(mask, shared))
        return [self.measured[keys[mask]][0] for mask in masks]

    def _measure(self, measure: str, masks: Sequence[Mask], batch: int) -> dict[Mask, float]:
        self.ranks.check_equal("the masks", [measure, batch, [list(mask) for mask in masks]])
        compare = self._divergences if measure == "kl" else self._losses
        coming = self.forward.last_hiddens([self.rows(batch).inputs], masks)
        found: dict[Mask, float] = {}
        while students := {mask: hidden for mask, (hidden,) in islice(coming, self.masks_at_once or len(masks))}:
            with named_range("loss"):
                found.update(zip(students, compare(list(students.values()), batch), strict=True))
            for _ in students:
                self.advance()
            del students  # before the next ones come
        totals = self._over_ranks(list(found.values()), batch, _COUNTS[measure])
        values = dict(zip(found, totals, strict=True))
        for mask, value in values.items():
            if not math.isfinite(value):
                removed = [unit for unit, runs in enumerate(mask) if not runs]
                what = "layers" if self.units.units_per_layer == 1 else "sub-layers"
                raise FloatingPointError(f"the {measure.upper()} is {value} on batch {batch} without {what} {removed}")
        return values

    def _divergences(self, students: list[Tensor], batch: int) -> list[float]:
        """The mean KL of each of `students` from the dense model, hidden states (B, T, H); its logits are made once."""
        rows = self.rows(batch)
        teacher = rows.at_counted(self.teacher_of(batch))
        flat = [rows.at_counted(student.flatten(0, 1)) for student in students]
        sums = [0.0] * len(students)
        for tile in self._tiles(len(teacher)):
            target = self.head.logits(teacher[tile])
            for number, student in enumerate(flat):
                loss: Any = e3k.entropy_kl(self.head.logits(student[tile]), target, weighting="none", reduction="sum")
                sums[number] += float(loss)
        return [total / len(teacher) for total in sums]

    def _losses(self, students: list[Tensor], batch: int) -> list[float]:
        """The mean −log p of the tokens to predict, under each of `students`."""
        rows = self.rows(batch)
        labels = rows.predicted
        flat = [rows.at_predicted(student) for student in students]
        sums = [0.0] * len(students)
        for tile in self._tiles(len(labels)):
            for number, student in enumerate(flat):
                logits = self.head.logits(student[tile]).float()
                sums[number] += F.cross_entropy(logits, labels[tile], reduction="sum").item()
        return [total / len(labels) for total in sums]

    def _tiles(self, rows: int) -> list[slice]:
        size = max(1, _TILE_LOGITS // self.head.weight.shape[0])
        return [slice(start, start + size) for start in range(0, rows, size)]

    def _keep(self, found: dict[str, list[float]], seconds: dict[str, float]) -> None:
        self.measured |= found
        self.seconds |= seconds
        self.committed()

    def _over_ranks(self, means: list[float], batch: int, over: str) -> list[float]:
        """The means over a batch of all ranks, of which each counts by its tokens."""
        share = self.ranks.count * self._own[over][batch] / self._all[over][batch]  # 1 where all have as many
        return [total / self.ranks.count for total in self.ranks.sum([share * mean for mean in means])]

    def _work(self, mask: Mask, shared: int) -> float:
        """Of a dense pass: what `mask` runs from unit `shared` on, and the head. A layer is begun as a whole."""
        first = shared - shared % self.units.units_per_layer
        return self._head_cost + sum(
            cost for cost, runs in zip(self._unit_costs[first:], mask[first:], strict=True) if runs
        )

    def _pay_dense(self, batch: int) -> None:
        self._pay(f"dense {batch}", batch, sum(self._unit_costs))

    def _pay(self, key: str, batch: int, passes: float) -> None:
        self.account.pay(key, passes * self._all["text"][batch], self.seconds.get(key, 0.0))


def _costs(layers: nn.ModuleList, head_size: int, units_per_layer: int) -> tuple[list[float], float]:
    """The share of each unit and of the output head in the parameters that a forward pass multiplies by."""
    stack_size = sum(p.numel() for p in layers.parameters())
    whole = stack_size + head_size
    if units_per_layer == 1:
        return [stack_size / len(layers) / whole] * len(layers), head_size / whole
    attention = sum(p.numel() for layer in layers for p in attention_of(layer).parameters())
    sizes = attention / len(layers), (stack_size - attention) / len(layers)
    return [size / whole for size in sizes] * len(layers), head_size / whole
