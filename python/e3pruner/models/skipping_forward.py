"""Hidden states of a model under many layer masks, sharing what the masks share.

Masks sorted by their bits form a tree: two neighbours agree on the layers before the first one they treat differently.
Each mask therefore starts from the hidden state at that layer, which an earlier mask left behind. For the L masks that
each lack one layer this halves the work; for samples around one mask it saves their common prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from e3kernels.profiling import named_range
from e3pruner.models import find_layers, last_hidden
from e3pruner.models.sublayers import KINDS, hooked, writer

Mask = tuple[bool, ...]  # one entry a unit (see `Units`); True: it runs


class SkippingForward:
    """Runs `model` with any of its decoder layers skipped, as a context manager.

    With `sublayers` a mask has two entries a layer, its attention and its MLP. One that is skipped alone is computed
    all the same and adds nothing.

    Inside, the `forward` of every decoder layer can return its input (the layer is skipped) or a stored hidden state
    (the layers before were run for another mask). The layers keep their places, so a model that reads its configuration
    by layer index sees the indices it expects. Leaving the context gives the layers their own `forward` back.
    """

    def __init__(self, model: PreTrainedModel, *, sublayers: bool = False) -> None:
        self.model = model
        self.layers = find_layers(model)
        self._units_a_layer = 2 if sublayers else 1
        self._context = ExitStack()
        self._mask: Mask = ()
        self._start = 0
        self._stored: frozenset[int] = frozenset()
        self._states: dict[int, Tensor] = {}
        self._own: list[Callable[..., Any] | None] = []
        self._extra_outputs: tuple[None, ...] | None = None  # beside the hidden state; None: it comes bare
        self._form_is_known = False

    def __enter__(self) -> Self:
        for index, layer in enumerate(self.layers):
            self._own.append(vars(layer).get("forward"))
            layer.forward = self._skippable(index, layer.forward)
        if self._units_a_layer == 2:
            writers = [writer(layer, kind) for layer in self.layers for kind in KINDS]
            self._context.enter_context(hooked(writers, self._silence))
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.close()
        for layer, own in zip(self.layers, self._own, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own
        self._own.clear()
        self._states.clear()

    def dense(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The last hidden state (B, T, H) with every layer. `inputs`: the arguments of `last_hidden`."""
        return self._run(inputs, self._whole, 0, frozenset())

    def states(self, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """The input of every layer and the output of the last one, before the final norm: L + 1 times (B, T, H); and
        the last hidden state (B, T, H)."""
        last = self._run(inputs, self._whole, 0, frozenset(range(len(self.layers) + 1)))
        return [self._states[index] for index in range(len(self.layers) + 1)], last

    def last_hiddens(self, inputs: Mapping[str, Tensor], masks: Sequence[Mask]) -> Iterator[tuple[Mask, Tensor]]:
        """Yields (mask, last hidden state (B, T, H) under it), in the order of `shared_prefixes`.

        `inputs`: the arguments of `last_hidden`. `masks`: distinct.
        """
        ordered = [(mask, shared // self._units_a_layer) for mask, shared in shared_prefixes(masks)]
        stored = frozenset(start for _, start in ordered)
        for mask, start in ordered:
            with named_range("student forward"):
                hidden = self._run(inputs, mask, start, stored)
            yield mask, hidden

    def _run(self, inputs: Mapping[str, Tensor], mask: Mask, start: int, stored: frozenset[int]) -> Tensor:
        """One pass, from what an earlier one stored at layer `start`; it stores the inputs of the layers `stored`."""
        self._mask, self._start, self._stored = mask, start, stored
        if start == 0:
            self._states.clear()
        return last_hidden(self.model, **inputs)

    def _skippable(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def skippable(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if not self._form_is_known:  # nothing but running a layer tells
                self._learn_form(forward(*args, **kwargs))
            if index == self._start - 1:
                hidden = self._states[self._start]
            if index < self._start:
                return self._as_output(hidden)
            if index in self._stored:
                self._states[index] = hidden
            output = forward(*args, **kwargs) if self._runs(index) else self._as_output(hidden)
            if index + 1 == len(self.layers) and index + 1 in self._stored:
                self._states[index + 1] = output[0] if isinstance(output, tuple) else output
            return output

        return skippable

    @property
    def _whole(self) -> Mask:
        return (True,) * (self._units_a_layer * len(self.layers))

    def _runs(self, layer: int) -> bool:
        size = self._units_a_layer
        return any(self._mask[size * layer : size * (layer + 1)])

    def _silence(self, unit: int, output: Tensor) -> Tensor | None:
        return None if self._mask[unit] else torch.zeros_like(output)

    def _learn_form(self, output: Any) -> None:
        self._extra_outputs = (None,) * (len(output) - 1) if isinstance(output, tuple) else None
        self._form_is_known = True

    def _as_output(self, hidden: Tensor) -> Any:
        return hidden if self._extra_outputs is None else (hidden, *self._extra_outputs)


def shared_prefixes(masks: Sequence[Mask]) -> list[tuple[Mask, int]]:
    """The masks, sorted so that neighbours share prefixes, and how many units each shares with the one before."""
    ordered = sorted(masks, reverse=True)
    return list(zip(ordered, [0, *(_common_prefix(a, b) for a, b in pairwise(ordered))], strict=False))


def _common_prefix(a: Mask, b: Mask) -> int:
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
