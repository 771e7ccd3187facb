"""Hidden states of a model under many layer masks, layer by layer: every layer is entered once for all of them.

Masks that agree on their first layers share the states up to there, so each layer is called once for every distinct
prefix of the masks that keeps it. For the L masks that each lack one layer this halves the work; for samples around one
mask it saves their common prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from e3kernels.profiling import named_range
from e3pruner.models.head import last_hidden
from e3pruner.models.layer_calls import Inputs, Way, brief, entries, hidden_place, recorded, replaced, route_of
from e3pruner.models.layer_walk import LayerWalk, silencing, walk
from e3pruner.models.stack import find_layers

Mask = tuple[bool, ...]  # one entry per unit (see `Units`); True: it runs


class SkippingForward:
    """Runs `model`, which is in evaluation mode, with any of its decoder layers skipped.

    sublayers: a mask has two entries per layer, its attention and its MLP. One that is skipped alone is computed all
    the same and adds nothing.
    masks_at_once: how many masks are walked together; all of them unless told. While a layer runs two hidden states
    per mask exist at most, and each layer is entered once per group of masks.
    prefixes_per_call: how many hidden states are concatenated for one call of a layer. With 1, a mask's hidden state
    has the bits of a plain forward pass, whichever masks it is computed with. Larger numbers save calls where reading
    the weights of a layer costs more than multiplying by them, and change the rounding. A model whose layers share a
    mapping, and layers before which it changes the hidden state, still take one at a time.

    The layers keep their places, so a model that reads its configuration by layer index sees the indices it expects.
    Inputs are what the module that holds the layers takes, by name: "input_ids" (B, T), "attention_mask" and so on;
    None is as good as absent.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        sublayers: bool = False,
        masks_at_once: int | None = None,
        prefixes_per_call: int = 1,
    ) -> None:
        self.model = model
        self.layers = find_layers(model)
        self._size = 2 if sublayers else 1
        self._masks_at_once = masks_at_once
        self._prefixes_per_call = prefixes_per_call

    def dense(self, inputs: Inputs) -> Tensor:
        """The last hidden state (B, T, H) with every layer."""
        return last_hidden(self.model, **inputs)

    def states(self, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
        """The input of every layer and the output of the last one, before the final norm: L + 1 times (B, T, H); and
        the last hidden state (B, T, H)."""
        steps, last = recorded(self.model, inputs)
        return [*(step.arguments[hidden_place(step.arguments)] for step in steps), entries(steps[-1].output)[0]], last

    def last_hiddens(self, batches: Sequence[Inputs], masks: Sequence[Mask]) -> Iterator[tuple[Mask, list[Tensor]]]:
        """Yields each mask with the last hidden state (B, T, H) of every batch under it, in the order of
        `shared_prefixes`. `masks` are distinct. All batches pass a layer before any enters the next.

        Raises `ValueError` if layers called one by one do not give what the model's own forward pass gives. That is
        tried first, once for each model and set of names of inputs, of one mask and of many, of one batch and of many:
        on a few tokens, with the mask that skips most.
        """
        given = [{name: value for name, value in batch.items() if value is not None} for batch in batches]
        walks = [LayerWalk(self.model, inputs, self._prefixes_per_call) for inputs in given]
        ordered = sorted(masks, reverse=True)
        self._prove(given, ordered)
        size = self._masks_at_once or max(1, len(ordered))
        for start in range(0, len(ordered), size):
            paths = {mask: self._path(walks[0], mask) for mask in ordered[start : start + size]}
            with named_range("student forward"):
                found = walk(walks, list(dict.fromkeys(paths.values())))
            yield from ((mask, [hiddens[path] for hiddens in found]) for mask, path in paths.items())
            del found  # before the next group comes

    def _path(self, walk: LayerWalk, mask: Mask) -> tuple[Mask, ...]:
        return tuple(self._units(mask, layer) for layer in walk.route.layers)

    def _units(self, mask: Mask, layer: int) -> Mask:
        return mask[self._size * layer : self._size * (layer + 1)]

    def _prove(self, batches: Sequence[Inputs], masks: Sequence[Mask]) -> None:
        """Raises `ValueError` unless a walk of few masks and tokens gives what the model's own forward pass gives."""
        way = Way(self._prefixes_per_call, min(len(masks), self._masks_at_once or len(masks)) > 1, len(batches) > 1)
        if not masks or any(known.covers(way) for known in route_of(self.model, batches[0]).proven):
            return
        walks = [LayerWalk(self.model, brief(inputs), self._prefixes_per_call) for inputs in batches[:2]]
        shortest = min(masks, key=sum)
        tried = sorted({masks[0], shortest, masks[-1]} if way.many_masks else {shortest}, reverse=True)
        paths = {mask: self._path(walks[0], mask) for mask in tried}
        found = walk(walks, list(dict.fromkeys(paths.values())))[0][paths[shortest]]
        expected = self._in_one_pass(walks[0].inputs, shortest)
        share = 1e-2 if torch.finfo(expected.dtype).bits == 16 else 1e-4
        bound = share * float(expected.abs().nan_to_num(0, 0, 0).max())
        if not torch.allclose(found, expected, rtol=0, atol=bound, equal_nan=True):
            error, joined = float((found - expected).abs().max()), self._prefixes_per_call
            raise ValueError(
                f"model ({self.model.config.model_type}): its layers, called one by one (prefixes_per_call={joined}), "
                f"give a last hidden state that differs by {error:.3g} from that of its own forward pass"
            )
        walks[0].route.proven.add(way)

    def _in_one_pass(self, inputs: Inputs, mask: Mask) -> Tensor:
        """The last hidden state under `mask` by the model's own forward pass."""
        units = {layer: self._units(mask, index) for index, layer in enumerate(self.layers)}
        removed = {index: layer for index, layer in enumerate(self.layers) if not any(units[layer])}
        route = route_of(self.model, inputs)
        with ExitStack() as stack:
            for layer in units:
                if any(units[layer]):
                    stack.enter_context(silencing(layer, units[layer]))
            stack.enter_context(replaced(removed, lambda index, given, own: route.handed_on(index, given)))
            return last_hidden(self.model, **inputs)


def shared_prefixes(masks: Sequence[Mask]) -> list[tuple[Mask, int]]:
    """The masks, sorted so that neighbours share prefixes, and how many units each shares with the one before."""
    ordered = sorted(masks, reverse=True)
    return list(zip(ordered, [0, *(_common_prefix(a, b) for a, b in pairwise(ordered))], strict=False))


def _common_prefix(a: Mask, b: Mask) -> int:
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
