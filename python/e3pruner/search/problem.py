"""The question every search method answers: which layers may go at the least Kullback-Leibler divergence?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

import e3kernels as e3k
from e3kernels.profiling import named_range
from e3pruner.models import output_head
from e3pruner.models.stack import evaluating
from e3pruner.precision import weights_in
from e3pruner.search.forward import Mask, SkippingForward, shared_prefixes

_PASS_TOKENS = 512  # of one forward pass: enough to tell good masks from bad ones, so that a step need not cost more
_TILE_LOGITS = 1 << 24  # of one model that exist at a time


class SearchProblem:
    """A model, its calibration tokens, how many layers shall go, and an account of what has been spent.

    `score` is the one measure: the mean over tokens of KL(dense model || model without the layers), in nats, over the
    full vocabulary, forward only. `batches` are the given ones, (B, T) each, split so that a forward pass is short.

    Used as a context manager: inside, the model is in evaluation mode, its weights are rounded to `dtype` (None: they
    are not) and its layers can be skipped; leaving restores it.

    Everything measured is kept in `measured`. A search method is a deterministic function of its seed and of what it
    measures; given the `measured` of an interrupted run it comes back to where that run was, without computing, and
    goes on to the same result, bit for bit.

    `cost` counts dense forward passes times tokens: each layer run, and each use of the output head, with its share of
    the parameters. What a method asks for twice is paid for once, what was `measured` before it began is paid for too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Tensor],
        *,
        drop: int,
        protect: Sequence[int] = (),
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.batches = [part for batch in batches for part in batch.split(max(1, _PASS_TOKENS // batch.shape[1]))]
        self.drop = drop
        self.seed = seed
        self.forward = SkippingForward(model)
        self.num_layers = len(self.forward.layers)
        self.free = [layer for layer in range(self.num_layers) if layer not in set(protect)]
        self.measured: dict[str, list[float]] = {}
        self.cost = 0.0
        self.expect: Callable[[int], None] = lambda passes: None
        self.advance: Callable[[], None] = lambda: None
        self.committed: Callable[[], None] = lambda: None
        self._dtype = dtype
        self._head = output_head(model)
        self._teacher: dict[int, Tensor] = {}
        self._paid: set[str] = set()
        self._context = ExitStack()
        stack_size = sum(p.numel() for layer in self.forward.layers for p in layer.parameters())
        head_size = self._head.weight.numel()
        self._layer_cost = stack_size / (stack_size + head_size) / self.num_layers
        self._head_cost = head_size / (stack_size + head_size)

    def __enter__(self) -> Self:
        self._context.enter_context(evaluating(self.model))
        self._context.enter_context(torch.no_grad())
        self._context.enter_context(weights_in(self.model.parameters(), self._dtype))
        self._context.enter_context(self.forward)
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.close()

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return sum(batch.numel() for batch in self.batches)

    def mask(self, removed: Sequence[int]) -> Mask:
        """The mask that lacks the layers `removed`."""
        gone = set(removed)
        return tuple(layer not in gone for layer in range(self.num_layers))

    def score(self, masks: Sequence[Mask], batches: Sequence[int] | None = None) -> list[float]:
        """Mean KL a token, in nats, of each mask over the batches with these numbers (all of them unless told).

        Raises `FloatingPointError` naming the mask whose KL is not finite.
        """
        chosen = range(len(self.batches)) if batches is None else batches
        table = [self._scores(masks, batch) for batch in chosen]
        return self._mean(table, chosen)

    def state_distance(self, span: int, measure: Callable[[Tensor], Tensor]) -> list[float]:
        """Mean of `measure`(cos) over the calibration tokens, for each of the L − span + 1 runs of `span` layers.

        cos, in fp32, is that of the angle between what enters the run and what leaves it.
        """
        table = [self._distances(span, measure, batch) for batch in range(len(self.batches))]
        return self._mean(table, range(len(self.batches)))

    def _distances(self, span: int, measure: Callable[[Tensor], Tensor], batch: int) -> list[float]:
        key = f"{measure.__name__} {span} {batch}"
        if key not in self.measured:
            states = [state.float() for state in self.forward.states(self._input_ids(batch))]
            cosines = [torch.cosine_similarity(a, b, dim=-1) for a, b in zip(states, states[span:], strict=False)]
            self._keep({key: [measure(cosine).mean().item() for cosine in cosines]})
            self.advance()
        self._pay(key, batch, self.num_layers)
        return self.measured[key]

    def _scores(self, masks: Sequence[Mask], batch: int) -> list[float]:
        keys = {mask: f"kl {batch} {''.join('01'[runs] for runs in mask)}" for mask in masks}
        unknown = [mask for mask, key in keys.items() if key not in self.measured]
        if unknown:
            self._keep({keys[mask]: [value] for mask, value in self._measure(unknown, batch)})
        self._pay(f"teacher {batch}", batch, self.num_layers)
        for mask, shared in shared_prefixes([mask for mask, key in keys.items() if key not in self._paid]):
            self._pay(keys[mask], batch, sum(mask[shared:]), head=True)
        return [self.measured[keys[mask]][0] for mask in masks]

    def _measure(self, masks: Sequence[Mask], batch: int) -> list[tuple[Mask, float]]:
        input_ids = self._input_ids(batch)
        if batch not in self._teacher:
            with named_range("teacher forward"):
                self._teacher[batch] = self.forward.dense(input_ids).flatten(0, 1)
        students: dict[Mask, Tensor] = {}
        for mask, hidden in self.forward.last_hiddens(input_ids, masks):
            students[mask] = hidden.flatten(0, 1)
            self.advance()
        with named_range("loss"):
            values = self._divergences(list(students.values()), self._teacher[batch])
        for mask, value in zip(students, values, strict=True):
            if not math.isfinite(value):
                removed = [layer for layer, runs in enumerate(mask) if not runs]
                raise FloatingPointError(f"the KL is {value} on batch {batch} without layers {removed}")
        return list(zip(students, values, strict=True))

    def _mean(self, table: list[list[float]], batches: Sequence[int]) -> list[float]:
        """The mean of the rows of `table`, one a batch, weighted by their tokens."""
        sizes = [self.batches[batch].numel() for batch in batches]
        shares = [size / sum(sizes) for size in sizes]
        return [sum(a * b for a, b in zip(shares, column, strict=True)) for column in zip(*table, strict=True)]

    def _divergences(self, students: list[Tensor], teacher: Tensor) -> list[float]:
        """The mean KL of each of `students` from `teacher`, hidden states (N, H), the teacher's logits made once."""
        sums = [0.0] * len(students)
        size = max(1, _TILE_LOGITS // self._head.weight.shape[0])
        for start in range(0, len(teacher), size):
            rows = slice(start, start + size)
            target = self._head.logits(teacher[rows])
            for number, student in enumerate(students):
                loss: Any = e3k.entropy_kl(self._head.logits(student[rows]), target, weighting="none", reduction="sum")
                sums[number] += float(loss)
        return [total / len(teacher) for total in sums]

    def _input_ids(self, batch: int) -> Tensor:
        return self.batches[batch].to(self._head.weight.device)

    def _keep(self, found: dict[str, list[float]]) -> None:
        self.measured |= found
        self.committed()

    def _pay(self, key: str, batch: int, layers: int, head: bool = False) -> None:
        if key not in self._paid:
            self._paid.add(key)
            self.cost += (self._layer_cost * layers + self._head_cost * head) * self.batches[batch].numel()
