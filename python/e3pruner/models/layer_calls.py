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
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from e3pruner.models.head import last_hidden
from e3pruner.models.stack import calling, decoder_of, evaluating, find_layers, speaker_of

Place = int | str  # of an argument: its position or its name
Arguments = dict[Place, Any]
Inputs = Mapping[str, Any]  # of the module that holds the layers, by name: "input_ids", "attention_mask" and so on
Forward = Callable[[int, Arguments, Callable[[Arguments], Any]], Any]
_BRIEF = 8  # tokens, enough to see where a layer's arguments come from


class Way(NamedTuple):
    """A way of walking a model: how many prefixes share a call, and whether there are many masks and many batches."""

    prefixes_per_call: int
    many_masks: bool
    many_batches: bool

    def covers(self, other: Way) -> bool:
        """Whether `other` does nothing that this way does not."""
        return self.prefixes_per_call == other.prefixes_per_call and all(
            mine or not others for mine, others in zip(self[1:], other[1:], strict=True)
        )


@dataclass(frozen=True)
class Step:
    """One call of a layer in a forward pass."""

    layer: int
    arguments: Arguments
    output: Any
    wrote: bool  # into the hidden state that it was given


@dataclass
class Route:
    """How hidden states pass through the layers of a model.

    kinds: the class of every layer. layers: in the order of their calls. forms: of what a layer returns, by layer: None
    for a bare hidden state, else for each further entry of the tuple the argument in which the next layer is given it,
    or that it is the next state of, if any. links: for each call but the first, the arguments that are entries of what
    the call before returned, and which; None where the model changes the hidden state in between. shared: for each call
    but the first, the mappings that the call before was given too. tail: the child of the module that holds the layers
    that turns what the last layer returned into the last hidden state; None where more happens there. writers: layers
    that write into the hidden state that they are given. proven: the ways of walking it, of one mask or many, one batch
    or many, that have been seen to give what the model gives. example: a few tokens and the last hidden state that the
    model gave for them, if it was learnt from them.
    """

    kinds: list[type]
    layers: list[int]
    forms: dict[int, list[Place | None] | None]
    links: list[dict[Place, int] | None]
    shared: list[list[Place]]
    tail: str | None
    writers: set[int]
    proven: set[Way] = field(default_factory=set)
    example: tuple[Inputs, Tensor] | None = None

    def handed_on(self, layer: int, arguments: Arguments) -> Any:
        """What `layer` returns if it is skipped: its hidden state, and the rest as it was given, in the layer's form.

        Raises `ValueError` for a layer whose form was not seen.
        """
        if layer not in self.forms:
            raise ValueError(f"layer {layer} was not called by the first forward pass: what it returns is not known")
        hidden, rest = arguments[hidden_place(arguments)], self.forms[layer]
        return hidden if rest is None else (hidden, *(None if place is None else arguments[place] for place in rest))


# Of a stack, by the names of the inputs and the dtype of the weights: with narrow ones Mamba casts what its layers hand
# to the norm behind them, with wide ones it does not.
_ROUTES: WeakKeyDictionary[nn.Module, dict[tuple[frozenset[str], torch.dtype], Route]] = WeakKeyDictionary()


def route_of(model: PreTrainedModel, inputs: Inputs | None = None) -> Route:
    """The route of hidden states through `model`, for each set of names of `inputs` and each dtype of its weights as
    the first forward pass with them took it that was `recorded`; where none was, it is run on a few of their tokens.
    """
    if inputs is None:
        model, inputs = speaker_of(model), {"input_ids": torch.arange(_BRIEF, device=model.device)[None]}
    if (route := _known(model, inputs)) is None:
        with torch.no_grad(), evaluating(model):
            _, last = recorded(model, few := brief(inputs))
        route = _ROUTES[find_layers(model)][_key(model, inputs)]
        route.example = few, last
    return route


def brief(inputs: Inputs) -> Inputs:
    """A few tokens of the first row, one of padding before them where there is some; all of it where anything in
    `inputs` is not (B, T)."""
    shapes = {value.shape if isinstance(value, Tensor) else None for value in inputs.values()}
    if len(shapes) > 1 or any(shape is None or len(shape) != 2 for shape in shapes):
        return inputs
    mask = inputs.get("attention_mask")
    start = 0 if mask is None else max(0, int(mask[0].argmax()) - 1)
    return {name: value[:1, start : start + _BRIEF] for name, value in inputs.items()}


def recorded(model: PreTrainedModel, inputs: Inputs) -> tuple[list[Step], Tensor]:
    """The calls of the layers in one forward pass of `model`, and the last hidden state (B, T, H). The route is learnt
    from them."""
    steps: list[Step] = []
    behind: list[tuple[str, Any, Any]] = []  # of the other children: name, what each was given first, what it returned

    def see(name: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        behind.append((name, args[0] if args else None, output))

    def record(layer: int, arguments: Arguments, own: Callable[[Arguments], Any]) -> Any:
        hidden = arguments[hidden_place(arguments)]
        version = None if hidden.is_inference() else hidden._version
        output = own(arguments)
        steps.append(Step(layer, arguments, output, version is None or hidden._version != version))
        return output

    layers = find_layers(model)
    with ExitStack() as stack:
        stack.enter_context(replaced(dict(enumerate(layers)), record))
        for name, child in decoder_of(model).named_children():
            stack.callback(child.register_forward_hook(partial(see, name)).remove)
        last = last_hidden(model, **inputs)
    if _known(model, inputs) is None:
        hidden = entries(steps[-1].output)[0]
        tail = next((name for name, given, output in behind if given is hidden and _same(output, last)), None)
        _ROUTES.setdefault(layers, {})[_key(model, inputs)] = _route(layers, steps, tail)
    return steps, last


def _same(output: Any, last: Tensor) -> bool:
    """Whether `last` is all of `output`: the model may slice it by `logits_to_keep` on the way to the head."""
    alike = isinstance(output, Tensor) and output.shape == last.shape and output.stride() == last.stride()
    return alike and output.data_ptr() == last.data_ptr()


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


def _key(model: PreTrainedModel, inputs: Inputs) -> tuple[frozenset[str], torch.dtype]:
    weight: Tensor = model.get_output_embeddings().weight
    return frozenset(inputs), weight.dtype


def _known(model: PreTrainedModel, inputs: Inputs) -> Route | None:
    layers = find_layers(model)
    route = _ROUTES.get(layers, {}).get(_key(model, inputs))
    return route if route is not None and route.kinds == [type(layer) for layer in layers] else None


def _call(forward: Forward, index: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    arguments: Arguments = dict(enumerate(args))
    arguments.update(kwargs)
    return forward(index, arguments, partial(call, own))


def _route(layers: nn.ModuleList, steps: list[Step], tail: str | None) -> Route:
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
        tail=tail,
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
