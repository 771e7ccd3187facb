"""What a model calls its decoder layers with and what they return, learnt by watching its own forward pass.

A layer may be given more than the hidden state of the one before: a router's state, the indices that an indexer chose,
a mapping that an earlier layer wrote into. Nothing but a forward pass tells where that comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from e3pruner.models.head import last_hidden
from e3pruner.models.stack import calling, evaluating, find_layers

Place = int | str  # of an argument: its position or its name
Arguments = dict[Place, Any]
Inputs = Mapping[str, Any]  # of the module that holds the layers, by name: "input_ids", "attention_mask" and so on
Forward = Callable[[int, Arguments, Callable[[Arguments], Any]], Any]


@dataclass(frozen=True)
class Step:
    """One call of a layer in a forward pass."""

    layer: int
    arguments: Arguments
    output: Any
    wrote: bool  # into the hidden state that it was given


@dataclass(frozen=True)
class Route:
    """How hidden states pass through the layers of a model.

    kinds: the class of every layer. layers: in the order of their calls. forms: of what a layer returns, by layer: None
    for a bare hidden state, else for each further entry of the tuple the argument in which the next layer is given it,
    or that it is the next state of, if any. links: for each call but the first, the arguments that are entries of what
    the call before returned, and which; None where the model changes the hidden state in between. shared: for each call
    but the first, the mappings that the call before was given too. writers: layers that write into the hidden state
    that they are given. proven: the ways of walking it, of one mask or many, that have been seen to give what the model
    gives.
    """

    kinds: list[type]
    layers: list[int]
    forms: dict[int, list[Place | None] | None]
    links: list[dict[Place, int] | None]
    shared: list[list[Place]]
    writers: set[int]
    proven: set[tuple[int, bool, bool]] = field(default_factory=set)

    def handed_on(self, layer: int, arguments: Arguments) -> Any:
        """What `layer` returns if it is skipped: its hidden state, and the rest as it was given, in the layer's form.

        Raises `ValueError` for a layer whose form was not seen.
        """
        if layer not in self.forms:
            raise ValueError(f"layer {layer} was not called by the first forward pass: what it returns is not known")
        hidden, rest = arguments[hidden_place(arguments)], self.forms[layer]
        return hidden if rest is None else (hidden, *(None if place is None else arguments[place] for place in rest))


_ROUTES: WeakKeyDictionary[nn.Module, dict[frozenset[str], Route]] = WeakKeyDictionary()


def route_of(model: PreTrainedModel, inputs: Inputs | None = None) -> Route:
    """The route of hidden states through `model`, which is run on `inputs` for it, once for each set of their names.

    Without `inputs`, on a few tokens.
    """
    layers = find_layers(model)
    if inputs is None:
        inputs = {"input_ids": torch.arange(8, device=model.device)[None]}
    known, names = _ROUTES.setdefault(layers, {}), frozenset(inputs)
    if names not in known or known[names].kinds != [type(layer) for layer in layers]:
        with torch.no_grad(), evaluating(model):
            known[names] = _route(layers, recorded(model, inputs)[0])
    return known[names]


def recorded(model: PreTrainedModel, inputs: Inputs) -> tuple[list[Step], Tensor]:
    """The calls of the layers in one forward pass of `model`, and the last hidden state (B, T, H)."""
    steps: list[Step] = []

    def record(layer: int, arguments: Arguments, own: Callable[[Arguments], Any]) -> Any:
        hidden = arguments[hidden_place(arguments)]
        version = None if hidden.is_inference() else hidden._version
        output = own(arguments)
        steps.append(Step(layer, arguments, output, version is None or hidden._version != version))
        return output

    with replaced(dict(enumerate(find_layers(model))), record):
        return steps, last_hidden(model, **inputs)


@contextmanager
def replaced(layers: Mapping[int, nn.Module], forward: Forward) -> Iterator[None]:
    """Inside the block the forward of layer i is `forward(i, arguments, own)`, `own(arguments)` being what it was."""
    with ExitStack() as stack:
        for index, layer in layers.items():
            stack.enter_context(calling(layer, partial(_call, forward, index, layer.forward)))
        yield


def call(layer: Callable[..., Any], arguments: Arguments) -> Any:
    """`layer` called with `arguments`."""
    positions = sorted(place for place in arguments if isinstance(place, int))
    named = {place: value for place, value in arguments.items() if isinstance(place, str)}
    return layer(*(arguments[position] for position in positions), **named)


def hidden_place(arguments: Arguments) -> Place:
    """Where a layer is given the hidden state."""
    return 0 if 0 in arguments else "hidden_states"


def entries(output: Any) -> tuple[Any, ...]:
    """What a layer returns, as a tuple; the hidden state comes first."""
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def _call(forward: Forward, index: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    arguments: Arguments = dict(enumerate(args))
    arguments.update(kwargs)
    return forward(index, arguments, partial(call, own))


def _route(layers: nn.ModuleList, steps: list[Step]) -> Route:
    links = [_links(step, after) for step, after in pairwise(steps)]
    places = {entry: place for found in links for place, entry in found.items() if entry > 0}
    forms: dict[int, list[Place | None] | None] = {step.layer: None for step in steps}
    for step in steps:
        if isinstance(step.output, tuple | list):
            if hasattr(step.output, "_fields"):
                kind = type(step.output).__name__
                raise ValueError(f"layer {step.layer} returns a {kind}: what it carries on is not one hidden state")
            rest = enumerate(step.output)
            forms[step.layer] = [places.get(entry) or _given(step, value) for entry, value in rest if entry]
    return Route(
        kinds=[type(layer) for layer in layers],
        layers=[step.layer for step in steps],
        forms=forms,
        links=[found if 0 in found.values() else None for found in links],
        shared=[_shared(step, after) for step, after in pairwise(steps)],
        writers={step.layer for step in steps if step.wrote},
    )


def _links(step: Step, after: Step) -> dict[Place, int]:
    """The arguments of `after` that `step` returned. The hidden state is one of them unless the model changed it."""
    links = {}
    for number, entry in enumerate(entries(step.output)):
        for place, value in after.arguments.items():
            is_hidden = place == hidden_place(after.arguments)
            if entry is not None and value is entry and is_hidden == (number == 0):
                links[place] = number
    return links


def _given(step: Step, value: Any) -> Place | None:
    """The argument that `value`, which the layer returned, is the next state of: the only one that is made alike."""
    alike = [place for place, given in step.arguments.items() if _alike(given, value)]
    alike = [place for place in alike if place != hidden_place(step.arguments)]
    return alike[0] if len(alike) == 1 else None


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) > 0 and all(map(_alike, one, other))
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return tensors and one.shape == other.shape and one.dtype == other.dtype


def _shared(step: Step, after: Step) -> list[Place]:
    return [
        place
        for place, value in after.arguments.items()
        if isinstance(value, MutableMapping) and value is step.arguments.get(place)
    ]
