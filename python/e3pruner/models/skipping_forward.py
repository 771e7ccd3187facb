"""Hidden states of a model under many layer masks, layer by layer: every layer is entered once for all of them.

Masks that agree on their first layers share the states up to there, so each layer is called once for every distinct
prefix of the masks that keeps it. For the L masks that each lack one layer this halves the work; for samples around one
mask it saves their common prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from e3kernels.profiling import named_range
from e3pruner.models.head import last_hidden
from e3pruner.models.layer_calls import Inputs, Way, brief, entries, hidden_place, recorded, replaced, route_of
from e3pruner.models.layer_walk import LayerWalk, Path, silencing, walk
from e3pruner.models.stack import find_layers
from e3pruner.models.streaming import stream_of

STATES_AT_ONCE = 2**31  # bytes of hidden states, which share the memory with two layers
Mask = tuple[bool, ...]  # one entry per unit (see `Units`); True: it runs


class Proof(NamedTuple):
    """`walks` of a few tokens each. At the end of `path` the first is to agree with the model's own forward pass under
    `mask`.
    """

    walks: list[tuple[LayerWalk, list[Path]]]
    path: Path
    mask: Mask


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

    def groups(self, tokens: Sequence[int], masks: int = 1) -> list[range]:
        """The batches, of so many `tokens` each, that pass the layers together under `masks` masks: where weights come
        from files as many as have no more than `STATES_AT_ONCE` bytes of hidden states, elsewhere one at a time.
        """
        weight = self.model.get_output_embeddings().weight
        per_token = 2 * masks * weight.shape[1] * weight.element_size()  # before and behind a layer
        most = 0 if stream_of(self.model) is None else STATES_AT_ONCE // per_token
        starts, held = [0], 0
        for number, count in enumerate(tokens):
            if number > starts[-1] and held + count > most:
                starts.append(number)
                held = 0
            held += count
        return [range(start, end) for start, end in pairwise([*starts, len(tokens)])]

    def last_hiddens(self, batches: Sequence[Inputs], masks: Sequence[Mask]) -> Iterator[tuple[Mask, list[Tensor]]]:
        """Yields each mask with the last hidden state (B, T, H) of every batch under it, in the order of
        `shared_prefixes`. `masks` are distinct. All batches pass a layer before any enters the next.

        Raises `ValueError`, before it yields, if layers called one by one do not give what the model's own forward pass
        gives. That is tried once for each model and set of names of inputs, of one mask and of many, of one batch and
        of many: on a few tokens that go along, with the mask that skips most.
        """
        given = [{name: value for name, value in batch.items() if value is not None} for batch in batches]
        walks = [LayerWalk(self.model, inputs, self._prefixes_per_call) for inputs in given]
        ordered = sorted(masks, reverse=True)
        size = self._masks_at_once or max(1, len(ordered))
        for start in range(0, len(ordered), size):
            paths = {mask: self._path(walks[0], mask) for mask in ordered[start : start + size]}
            way = Way(self._prefixes_per_call, len(paths) > 1, len(given) > 1)
            proof = None if self._is_proven(given, way) else self._proof(walks, paths)
            if proof and stream_of(self.model) is None:  # first; streamed weights are better read once for both
                self._check(proof, walk(proof.walks)[0], way)
                proof = None
            with named_range("student forward"):
                own = [(each, list(paths.values())) for each in walks]
                found = walk([*(proof.walks if proof else ()), *own])
            if proof:
                self._check(proof, found[0], way)
                del found[: len(proof.walks)]
            yield from ((mask, [hiddens[path] for hiddens in found]) for mask, path in paths.items())
            del found  # before the next group comes

    def _path(self, walk: LayerWalk, mask: Mask) -> Path:
        return tuple(self._units(mask, layer) for layer in walk.route.layers)

    def _units(self, mask: Mask, layer: int) -> Mask:
        return mask[self._size * layer : self._size * (layer + 1)]

    def _is_proven(self, batches: Sequence[Inputs], way: Way) -> bool:
        return any(known.covers(way) for known in route_of(self.model, batches[0]).proven)

    def _proof(self, walks: Sequence[LayerWalk], paths: dict[Mask, Path]) -> Proof:
        """A few tokens of the first two batches, under up to three masks."""
        shortest = min(paths, key=sum)
        tried = [paths[mask] for mask in dict.fromkeys([next(iter(paths)), shortest, next(reversed(paths))])]
        few = [LayerWalk(self.model, brief(each.inputs), self._prefixes_per_call) for each in walks[:2]]
        return Proof([(each, tried) for each in few], paths[shortest], shortest)

    def _check(self, proof: Proof, found: Mapping[Path, Tensor], way: Way) -> None:
        """Raises `ValueError` unless the walk gave what the model's own forward pass gives."""
        first = proof.walks[0][0]
        actual, expected = found[proof.path], self._in_one_pass(first.inputs, proof.mask)
        share = 1e-2 if torch.finfo(expected.dtype).bits == 16 else 1e-4
        bound = share * float(expected.abs().nan_to_num(0, 0, 0).max())
        if not torch.allclose(actual, expected, rtol=0, atol=bound, equal_nan=True):
            error, joined = float((actual - expected).abs().max()), self._prefixes_per_call
            raise ValueError(
                f"model ({self.model.config.model_type}): its layers, called one by one (prefixes_per_call={joined}), "
                f"give a last hidden state that differs by {error:.3g} from that of its own forward pass"
            )
        first.route.proven.add(way)

    def _in_one_pass(self, inputs: Inputs, mask: Mask) -> Tensor:
        """The last hidden state under `mask` by the model's own forward pass."""
        units = {layer: self._units(mask, index) for index, layer in enumerate(self.layers)}
        removed = {index: layer for index, layer in enumerate(self.layers) if not any(units[layer])}
        route = route_of(self.model, inputs)
        # The pass that the route was learnt from says it already, of weights in files: others may have changed since.
        streamed = stream_of(self.model) is not None
        if streamed and all(mask) and route.example is not None and _equal(route.example[0], inputs):
            return route.example[1]
        with ExitStack() as stack:
            for layer in units:
                if any(units[layer]):
                    stack.enter_context(silencing(layer, units[layer]))
            stack.enter_context(replaced(removed, lambda index, given, own: route.handed_on(index, given)))
            return last_hidden(self.model, **inputs)


def each_last_hidden(model: PreTrainedModel, batches: Sequence[Inputs]) -> Iterator[Tensor]:
    """The last hidden state (B, T, H) of every batch; of a streamed model each layer is read once for as many of them
    as go together."""
    forward = SkippingForward(model)
    for group in forward.groups([_tokens(inputs) for inputs in batches]):
        if len(group) == 1:
            yield last_hidden(model, **batches[group[0]])
        else:
            ((_, hiddens),) = forward.last_hiddens([batches[each] for each in group], [(True,) * len(forward.layers)])
            yield from hiddens


def _tokens(inputs: Inputs) -> int:
    return max(value.shape[:2].numel() for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 1)


def _equal(one: Inputs, other: Inputs) -> bool:
    return one.keys() == other.keys() and all(
        isinstance(value, Tensor) and torch.equal(value, other[name]) for name, value in one.items()
    )


def shared_prefixes(masks: Sequence[Mask]) -> list[tuple[Mask, int]]:
    """The masks, sorted so that neighbours share prefixes, and how many units each shares with the one before."""
    ordered = sorted(masks, reverse=True)
    return list(zip(ordered, [0, *(_common_prefix(a, b) for a, b in pairwise(ordered))], strict=False))


def _common_prefix(a: Mask, b: Mask) -> int:
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
