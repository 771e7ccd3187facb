"""Hidden states of a model under many layer masks, sharing what the masks share.

Masks sorted by their bits form a tree: two neighbours agree on the layers before the first one they treat differently.
Each mask therefore starts from the hidden state at that layer, which an earlier mask left behind. For the L masks that
each lack one layer this halves the work; for samples around one mask it saves their common prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from e3kernels.profiling import named_range
from e3pruner.models import find_layers, last_hidden

Mask = tuple[bool, ...]  # one entry a layer; True: the layer runs


class SkippingForward:
    """Runs `model` with any of its decoder layers skipped, as a context manager.

    Inside, the `forward` of every decoder layer can return its input (the layer is skipped) or a stored hidden state
    (the layers before were run for another mask). The layers keep their places, so a model that reads its configuration
    by layer index sees the indices it expects. Leaving the context gives the layers their own `forward` back.

    The first pass must be `dense` or `states`: it shows in which form the layers return the hidden state.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers = find_layers(model)
        self._mask: Mask = ()
        self._start = 0
        self._stored: frozenset[int] = frozenset()
        self._states: dict[int, Tensor] = {}
        self._own: list[Callable[..., Any] | None] = []
        self._extra_outputs: tuple[None, ...] | None = None

    def __enter__(self) -> Self:
        for index, layer in enumerate(self.layers):
            self._own.append(vars(layer).get("forward"))
            layer.forward = self._skippable(index, layer.forward)
        return self

    def __exit__(self, *error: Any) -> None:
        for layer, own in zip(self.layers, self._own, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own
        self._own.clear()
        self._states.clear()

    def dense(self, input_ids: Tensor) -> Tensor:
        """The last hidden state (B, T, H) with every layer."""
        return self._run(input_ids, (True,) * len(self.layers), 0, frozenset())

    def states(self, input_ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """The input of every layer and the output of the last one, before the final norm: L + 1 times (B, T, H); and
        the last hidden state (B, T, H)."""
        last = self._run(input_ids, (True,) * len(self.layers), 0, frozenset(range(len(self.layers) + 1)))
        return [self._states[index] for index in range(len(self.layers) + 1)], last

    def last_hiddens(self, input_ids: Tensor, masks: Sequence[Mask]) -> Iterator[tuple[Mask, Tensor]]:
        """Yields (mask, last hidden state (B, T, H) under it), in the order of `shared_prefixes`.

        `input_ids`: (B, T) integers. `masks`: distinct.
        """
        ordered = shared_prefixes(masks)
        stored = frozenset(start for _, start in ordered)
        for mask, start in ordered:
            with named_range("student forward"):
                hidden = self._run(input_ids, mask, start, stored)
            yield mask, hidden

    def _run(self, input_ids: Tensor, mask: Mask, start: int, stored: frozenset[int]) -> Tensor:
        """One pass, from what an earlier one stored at layer `start`; it stores the inputs of the layers `stored`."""
        self._mask, self._start, self._stored = mask, start, stored
        if start == 0:
            self._states.clear()
        return last_hidden(self.model, input_ids)

    def _skippable(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def skippable(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == self._start - 1:
                hidden = self._states[self._start]
            if index < self._start:
                return self._as_output(hidden)
            if index in self._stored:
                self._states[index] = hidden
            output = forward(*args, **kwargs) if self._mask[index] else self._as_output(hidden)
            self._extra_outputs = (None,) * (len(output) - 1) if isinstance(output, tuple) else None
            if index + 1 == len(self.layers) and index + 1 in self._stored:
                self._states[index + 1] = output[0] if isinstance(output, tuple) else output
            return output

        return skippable

    def _as_output(self, hidden: Tensor) -> Any:
        return hidden if self._extra_outputs is None else (hidden, *self._extra_outputs)


def shared_prefixes(masks: Sequence[Mask]) -> list[tuple[Mask, int]]:
    """The masks, sorted so that neighbours share prefixes, and how many layers each shares with the one before."""
    ordered = sorted(masks, reverse=True)
    return list(zip(ordered, [0, *(_common_prefix(a, b) for a, b in pairwise(ordered))], strict=False))


def _common_prefix(a: Mask, b: Mask) -> int:
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
