"""Which decoder layer a tensor of a checkpoint belongs to, asked of transformers' own conversion table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from e3pruner.compat import NameConversion
from e3pruner.models.stack import stack_name

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class LayerName:
    """A name with the number of a decoder layer in it: `before` + number + `after`. `layer`: which layer that is; not
    always that number. Layers behind the last one (multi-token prediction) count on."""

    before: str
    number: int
    after: str
    layer: int

    def __str__(self) -> str:
        return f"{self.before}{self.number}{self.after}"


class TensorNames:
    """Names of tensors in the checkpoint of `model`, which may be on the meta device.

    Checkpoints do not call tensors as models do: experts are stored one by one, prefixes come and go, layers are
    counted in halves. The number of the layer in a name is the one whose change moves what the tensor becomes to
    another layer.
    """

    def __init__(self, model: PreTrainedModel, quantizer: Any = None) -> None:
        self.model = model
        self.num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self._conversion = NameConversion(model, quantizer)
        stack = stack_name(model)
        prefix, inside = f"{model.base_model_prefix}.", stack.removeprefix(f"{model.base_model_prefix}.")
        optional = f"(?:{re.escape(prefix)})?" if inside != stack else ""  # a bare base model's checkpoint lacks it
        self._stack = re.compile(rf"{optional}{re.escape(inside)}\.(\d+)\.")
        self._modules = {name for name, _ in model.named_modules()}
        self._containers = {"", stack, stack.rpartition(".")[0]}
        self._stems: dict[str, int] = {}  # text before a layer's number -> its number less its layer

    @property
    def stems(self) -> set[str]:
        """What stands before the number of a layer in the names seen so far, and in the model's own."""
        return {*self._stems, f"{stack_name(self.model)}."}

    def in_model(self, name: str) -> str:
        """What the model calls what the tensor `name` becomes, or becomes a part of."""
        return self._conversion(name)

    def layer_of(self, name: str) -> LayerName | None:
        """Where in `name` a layer's number stands; None if it belongs to no layer."""
        for found in _NUMBER.finditer(name):
            before, number, after = name[: found.start()], int(found[0]), name[found.end() :]
            if before in self._stems:
                return LayerName(before, number, after, number - self._stems[before])
        if (layer := self._layer(name)) is None:
            return None
        for found in _NUMBER.finditer(name):
            before, number, after = name[: found.start()], int(found[0]), name[found.end() :]
            following = [self._layer(f"{before}{number + step}{after}") for step in (1, 2)]
            if following == [layer + 1, layer + 2]:
                self._stems[before] = number - layer
            if following[1] not in (None, layer):
                return LayerName(before, number, after, layer)
        raise ValueError(f"tensor {name} becomes a part of layer {layer}, and no number in its name says so")

    def moved(self, name: LayerName, layer: int) -> str:
        """`name` as it is called in layer `layer`."""
        if name.before in self._stems:
            return f"{name.before}{layer + self._stems[name.before]}{name.after}"
        place = self._stack.sub("", self.in_model(str(name)), count=1)
        for number in range(2 * max(layer, self.num_layers) + 2):
            moved = f"{name.before}{number}{name.after}"
            if self._layer(moved) == layer and self._stack.sub("", self.in_model(moved), count=1) == place:
                return moved
        raise ValueError(f"tensor {name} has no name in layer {layer}")

    def check_known(self, names: Iterable[str]) -> None:
        """Raises ValueError naming the first of `names` that is no part of the model, nor of what its class is known
        to leave unread."""
        ignored = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_unexpected or ()]
        for name in names:
            inside = self.in_model(name)
            layer = self.layer_of(name)
            if layer is not None and layer.layer >= self.num_layers:
                continue
            if inside in self._conversion.tensors or any(pattern.search(inside) for pattern in ignored):
                continue
            owner = inside
            while owner not in self._modules:  # scales and zero points lie beside a weight, or below its name
                owner = owner.rpartition(".")[0]
            if owner in self._containers or self._stack.fullmatch(f"{owner}."):
                raise ValueError(
                    f"tensor {name} belongs to no known place of a {self.model.config.model_type} model "
                    f"({type(self.model).__name__})"
                )

    def _layer(self, name: str) -> int | None:
        found = self._stack.match(self.in_model(name))
        return int(found[1]) if found else None
