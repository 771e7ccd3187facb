"""The question every search method answers: which layers may go at the least Kullback-Leibler divergence?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

import e3kernels as e3k
from e3pruner.models import output_head
from e3pruner.models.stack import evaluating
from e3pruner.search.forward import Mask, SkippingForward, shared_prefixes

_PASS_TOKENS = 512  # of one forward pass: enough to tell good masks from bad ones, so that a step need not cost more


class SearchProblem:
    """A model, its calibration tokens, how many layers shall go, and an account of what has been spent.

    `score` is the one measure: the mean over tokens of KL(dense model || model without the layers), in nats, over the
    full vocabulary, forward only. `batches` are the given ones, (B, T) each, split so that a forward pass is short.

    Used as a context manager: inside, the model is in evaluation mode and can skip layers; leaving restores it.

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
        autocast: torch.dtype | None = None,
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
        self._autocast = autocast
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
        if self._autocast is not None:
            self._context.enter_context(torch.autocast(self._head.weight.device.type, dtype=self._autocast))
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
        sizes = [self.batches[batch].numel() for batch in chosen]
        shares = [size / sum(sizes) for size in sizes]
        return [sum(a * b for a, b in zip(shares, column, strict=True)) for column in zip(*table, strict=True)]

    def block_influence(self, batch: int) -> list[float]:
        """1 − cos(input, output) of each layer, mean over the tokens of a batch, in fp32."""
        key = f"influence {batch}"
        if key not in self.measured:
            states = self.forward.states(self._input_ids(batch))
            values = [
                1 - torch.cosine_similarity(before.float(), after.float(), dim=-1).mean().item()
                for before, after in pairwise(states)
            ]
            self._keep({key: values})
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

    def _measure(self, masks: Sequence[Mask], batch: int) -> Iterator[tuple[Mask, float]]:
        input_ids = self._input_ids(batch)
        if batch not in self._teacher:
            self._teacher[batch] = self.forward.dense(input_ids)
        for mask, student in self.forward.last_hiddens(input_ids, masks):
            value = self._kl(student, self._teacher[batch])
            if not math.isfinite(value):
                removed = [layer for layer, runs in enumerate(mask) if not runs]
                raise FloatingPointError(f"the KL is {value} on batch {batch} without layers {removed}")
            yield mask, value
            self.advance()

    def _kl(self, student: Tensor, teacher: Tensor) -> float:
        head = self._head
        loss: Any = e3k.linear_entropy_kl(
            student,
            head.weight,
            teacher,
            head.weight,
            student_bias=head.bias,
            teacher_bias=head.bias,
            student_softcap=head.softcap,
            teacher_softcap=head.softcap,
            student_scale=head.scale,
            teacher_scale=head.scale,
            weighting="none",
        )
        return float(loss)

    def _input_ids(self, batch: int) -> Tensor:
        return self.batches[batch].to(self._head.weight.device)

    def _keep(self, found: dict[str, list[float]]) -> None:
        self.measured |= found
        self.committed()

    def _pay(self, key: str, batch: int, layers: int, head: bool = False) -> None:
        if key not in self._paid:
            self._paid.add(key)
            self.cost += (self._layer_cost * layers + self._head_cost * head) * self.batches[batch].numel()
