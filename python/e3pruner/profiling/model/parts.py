"""The parts of a decoder: which module is which, as named ranges around their calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from e3pruner.models import find_layers
from e3pruner.profiling.ranged import ranged_method

# In the order in which tables and plots show them.
PARTS = ("attention", "ffn", "norm", "cache", "head", "embedding", "rest")
_TOKEN_MIXERS = ("attention", "attn", "mixer", "deltanet")


def parts_of(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """(name, module) of everything that is timed: the layers as "layer 0" …, within them each child that attends as
    "attention", norms as "norm", other children with weights as "ffn"; outside "embedding", "norm" and "head".
    """
    layers = find_layers(model)
    found: list[tuple[str, nn.Module]] = [("embedding", model.get_input_embeddings())]
    inside = {id(module) for layer in layers for module in layer.modules()}
    for index, layer in enumerate(layers):
        found.append((f"layer {index}", layer))
        found += [(kind, child) for child in layer.children() if (kind := _kind(child)) is not None]
        children = {id(child) for child in layer.children()}
        found += [("norm", m) for m in layer.modules() if _is_norm(m) and id(m) not in children]
    found += [("norm", m) for m in model.modules() if _is_norm(m) and id(m) not in inside]
    head = model.get_output_embeddings()
    return found if head is model.get_input_embeddings() else [*found, ("head", head)]


def part_of(path: tuple[str, ...]) -> tuple[int | None, str]:
    """The layer and the part that a path of ranges belongs to; what is in no part is the "rest" of layer or model."""
    layer = next((int(name.split()[1]) for name in path if name.startswith("layer ")), None)
    return layer, path[-1] if path and path[-1] in PARTS else "rest"


@contextmanager
def ranged_parts(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block every call of a part's `forward`, and each update of a key/value cache, is a named range.

    The model is not hooked and no module wrapped; names stay as they are.
    """
    with ExitStack() as undo:
        for name, module in parts_of(model):
            ranged_method(undo, module, "forward", name)
        ranged_method(undo, Cache, "update", "cache")
        yield


def _kind(module: nn.Module) -> str | None:
    name = type(module).__name__.lower()
    if any(word in name for word in _TOKEN_MIXERS):
        return "attention"
    if _is_norm(module):
        return "norm"
    return "ffn" if any(True for _ in module.parameters()) else None


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")
