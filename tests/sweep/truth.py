"""The truth that a pruned model is held to: the dense model, whose removed layers hand on what they are given.

Nothing of e3pruner is used here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .shrink import LAYERS

Batch = dict[str, Tensor]  # of the forward pass: input_ids (B, T) and what goes with them
_TOWERS = ("vision", "visual", "image", "video", "audio", "qformer")
# What a layer returns behind the hidden state, by model type: the argument in which it was given it, None for nothing.
_STATE: dict[str, list[Any]] = {
    "zaya": [1],
    "glm_moe_dsa": ["prev_topk_indices"],
    "hy_v4": ["prev_topk_indices"],
    "hy_v4_vl_text": ["prev_topk_indices"],
    "rwkv": ["state"],
    "xlnet": [1],
}


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The one list of `LAYERS` modules that lies in no other and in no tower of another kind."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == LAYERS
    ]
    own = [module for name, module in found if not any(other in name for other in _TOWERS)]
    if not own:
        raise LookupError(f"no list of {LAYERS} layers")
    return own[0]


@contextmanager
def bypassed(model: PreTrainedModel, removed: Iterable[int], batch: Batch) -> Iterator[None]:
    """Inside the block the layers `removed` of `model` are not run: they return what they are given, in the form in
    which they return it for `batch`.
    """
    layers = decoder_layers(model)
    forms = _forms(model, layers, batch)
    state = _STATE.get(model.config.get_text_config(decoder=True).model_type, [])
    removed = list(removed)

    def stand_in(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = dict(enumerate(args)) | kwargs
            hidden = given[0] if args else given["hidden_states"]
            if not forms.get(index):
                return hidden
            rest = [given.get(place) for place in state][: forms[index] - 1]
            return (hidden, *rest, *([None] * (forms[index] - 1 - len(rest))))

        return forward

    for index in removed:
        layers[index].forward = stand_in(index)
    try:
        yield
    finally:
        for index in removed:
            del layers[index].forward


@torch.no_grad()
def logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(B, T, V), without a cache."""
    return model(**batch, use_cache=False).logits


def _forms(model: PreTrainedModel, layers: nn.ModuleList, batch: Batch) -> dict[int, int]:
    """How long a tuple each layer returns; 0 for a bare hidden state."""
    forms: dict[int, int] = {}

    def note(index: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            forms[index] = len(output) if isinstance(output, tuple | list) else 0

        return hook

    handles = [layer.register_forward_hook(note(index)) for index, layer in enumerate(layers)]
    try:
        logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return forms
