"""One batch on its way through the layers of a model, under many masks at once.

A state is what the next layer is called with, all that the model hands over in it. Where nothing happens between two
layers the next call follows from what the layer returned; elsewhere, and before and after the layers, the model's own
forward pass runs, with stand-ins for the layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from e3pruner.models.head import last_hidden
from e3pruner.models.layer_calls import Arguments, Inputs, Place, call, entries, hidden_place, replaced, route_of
from e3pruner.models.stack import decoder_of, find_layers
from e3pruner.models.sublayers import KINDS, silenced, writer

Units = tuple[bool, ...]  # of one layer: the whole of it, or its attention and its MLP; True: it runs
Path = tuple[Units, ...]  # of the layers called so far
Returned = tuple[Arguments, Any]  # what a layer was given and what it returned


def walk(walks: Sequence[tuple[LayerWalk, Iterable[Path]]]) -> list[dict[Path, Tensor]]:
    """The last hidden state (B, T, H) of every batch at the end of each of its paths, which have the units of every
    call of a layer. Each layer is entered once, for all batches: its weights need to be in memory only meanwhile.
    """
    batches = [(each, list(dict.fromkeys(paths))) for each, paths in walks]
    states = [each.first() for each, _ in batches]
    for depth in range(len(batches[0][0].route.layers) - 1):
        for number, (each, paths) in enumerate(batches):
            states[number] = each.onward(depth, paths, states[number])
    return [each.last_hiddens(paths, states.pop(0)) for each, paths in batches]


class LayerWalk:
    """The batch `inputs` on its way through the layers of `model`; so many states as `prefixes_per_call` share a
    call.
    """

    def __init__(self, model: PreTrainedModel, inputs: Inputs, prefixes_per_call: int) -> None:
        self.model = model
        self.layers = find_layers(model)
        self.inputs = inputs
        self.route = route_of(model, inputs)
        self._prefixes_per_call = prefixes_per_call
        self._calls: dict[int, list[Arguments]] = {}

    def first(self) -> dict[Path, Arguments]:
        """The state before the first layer, by the empty path."""
        return {(): self._calls_of(1)[0]}

    def onward(self, depth: int, paths: Iterable[Path], states: Mapping[Path, Arguments]) -> dict[Path, Arguments]:
        """The states behind the layer called at `depth`, which is not the last, from those before it."""
        returned = self._through(depth, dict.fromkeys(path[: depth + 1] for path in paths), states)
        return {path: self._next(depth, *step) for path, step in returned.items()}

    def last_hiddens(self, paths: Iterable[Path], states: Mapping[Path, Arguments]) -> dict[Path, Tensor]:
        """The last hidden state (B, T, H) at the end of each path, from the states before the last layer."""
        last = len(self.route.layers) - 1
        returned = self._through(last, paths, states)
        if self.route.tail is not None:
            norm = decoder_of(self.model).get_submodule(self.route.tail)
            return {path: norm(entries(returned.pop(path)[1])[0]) for path in paths}
        return {path: self._pass(self.inputs, last, *returned.pop(path))[1] for path in paths}

    def _through(self, depth: int, paths: Iterable[Path], states: Mapping[Path, Arguments]) -> dict[Path, Returned]:
        """The layer called at `depth` on the state before the end of each path; by path."""
        layer = self.route.layers[depth]
        returned: dict[Path, Returned] = {}
        running: dict[Any, list[Path]] = {}
        for path in paths:
            state = states[path[:-1]]
            if any(path[-1]):
                running.setdefault((path[-1], *self._absent(depth, state)), []).append(path)
            else:
                returned[path] = state, self.route.handed_on(layer, state)
        size = self._prefixes_per_call if self._joins(depth) else 1
        for alike in running.values():
            with silencing(self.layers[layer], alike[0][-1]):
                for start in range(0, len(alike), size):
                    some = alike[start : start + size]
                    given = [states[path[:-1]] for path in some]
                    returned.update(zip(some, self._run(depth, given), strict=True))
        return returned

    def _run(self, depth: int, states: list[Arguments]) -> list[Returned]:
        """One call, of the layer at `depth`."""
        layer = self.route.layers[depth]
        if len(states) > 1:
            return self._run_joined(depth, states)
        arguments = dict(states[0])
        for place in self._mappings(depth):
            arguments[place] = copy(arguments[place])
        if layer in self.route.writers:
            arguments[hidden_place(arguments)] = arguments[hidden_place(arguments)].clone()
        return [(arguments, call(self.layers[layer], arguments))]

    def _run_joined(self, depth: int, states: list[Arguments]) -> list[Returned]:
        """One call on the rows of all `states`; what depends on the number of rows the model prepares for that many."""
        copies = len(states)
        arguments = dict(self._calls_of(copies)[depth])
        hidden = hidden_place(arguments)
        sizes = zip(arguments[hidden].shape, self._calls_of(1)[depth][hidden].shape, strict=True)
        rows = next(dim for dim, (many, one) in enumerate(sizes) if many != one)
        for place in self.route.links[depth - 1] or ():
            parts = [state[place] for state in states]
            arguments[place] = None if parts[0] is None else torch.cat(parts, rows if place == hidden else 0)
        output = call(self.layers[self.route.layers[depth]], arguments)
        split = [
            [None] * copies if entry is None else entry.chunk(copies, 0 if number else rows)
            for number, entry in enumerate(entries(output))
        ]
        outputs = zip(*split, strict=True) if isinstance(output, tuple | list) else split[0]
        return list(zip(states, outputs, strict=True))

    def _next(self, depth: int, arguments: Arguments, output: Any) -> Arguments:
        """The call that follows the one at `depth`."""
        links = self.route.links[depth]
        if links is None:
            return self._pass(self.inputs, depth, arguments, output)[0][depth + 1]
        returned = entries(output)
        linked = {place: returned[number] for place, number in links.items()}
        carried = {place: arguments[place] for place in self.route.shared[depth]}
        return self._calls_of(1)[depth + 1] | linked | carried

    def _pass(
        self, inputs: Inputs, depth: int = -1, arguments: Arguments | None = None, output: Any = None
    ) -> tuple[list[Arguments], Tensor]:
        """A forward pass with stand-ins for the layers: what they are called with, and the last hidden state.

        The one called at `depth` returns `output`, and writes what is in the mappings of `arguments` into those that it
        is given; the others hand on what they are given.
        """
        calls: list[Arguments] = []

        def stand_in(layer: int, given: Arguments, own: Any) -> Any:
            calls.append(given)
            if len(calls) != depth + 1:
                return self.route.handed_on(layer, given)
            for place in self._mappings(depth):
                given[place].update((arguments or {})[place])
            hidden, *rest = entries(output)
            return (hidden.clone(), *rest) if isinstance(output, tuple | list) else hidden.clone()

        with replaced(dict(enumerate(self.layers)), stand_in):
            return calls, last_hidden(self.model, **inputs)

    def _calls_of(self, copies: int) -> list[Arguments]:
        """What the layers are called with if all are skipped, for so many copies of the batch."""
        if copies not in self._calls:
            inputs = self.inputs
            if copies > 1:
                inputs = {name: torch.cat([value] * copies) for name, value in inputs.items()}
            self._calls[copies] = self._pass(inputs)[0]
        return self._calls[copies]

    def _mappings(self, depth: int) -> set[Place]:
        """The mappings that the call at `depth` shares with its neighbours."""
        before = self.route.shared[depth - 1] if depth else []
        return {*before, *(self.route.shared[depth] if depth < len(self.route.shared) else [])}

    def _joins(self, depth: int) -> bool:
        """Whether all that changes from state to state before `depth` is known to be rows of a batch."""
        rows = {len(value) if isinstance(value, Tensor) else None for value in self.inputs.values()}
        linked = depth > 0 and self.route.links[depth - 1] is not None
        return linked and not self._mappings(depth) and len(rows) == 1 and None not in rows

    def _absent(self, depth: int, state: Arguments) -> list[bool]:
        """Which of what the layer before returned is None in `state`."""
        return [state[place] is None for place in (self.route.links[depth - 1] or ())] if depth else []


def silencing(layer: nn.Module, units: Units) -> AbstractContextManager[None]:
    """Inside the block those units of `layer` that do not run add nothing."""
    silent = [writer(layer, kind) for kind, runs in zip(KINDS, units, strict=False) if not runs]
    return silenced(silent) if silent else nullcontext()
