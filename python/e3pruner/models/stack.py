"""Find the decoder stack of a Hugging Face causal language model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import cast

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of `model`, in order: the stack that every part of this package gates, skips and slices.

    It is the `nn.ModuleList` of `num_hidden_layers` modules, all of them `GradientCheckpointingLayer`s, that sits where
    the token embedding does: a vision or audio tower may have as many layers, and has no tokens.

    Raises `TypeError` for anything but a Hugging Face causal language model, PEFT-wrapped models included, and
    `ValueError` for encoder-decoders and models without exactly one such stack.
    """
    return cast(nn.ModuleList, model.get_submodule(stack_name(model)))


def stack_name(model: PreTrainedModel) -> str:
    """The qualified name of the decoder stack within `model`; the same errors as `find_layers`."""
    _refuse_unfit(model)
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    names = _beside_embedding(
        model,
        [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == count > 0
            and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
        ],
    )
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise ValueError(
            f"model ({type(model).__name__}) has no decoder stack that can be told apart: expected one ModuleList of "
            f"{count} decoder layers (num_hidden_layers), found {found}"
        )
    return names[0]


def check_indices(name: str, indices: Iterable[int], num_layers: int) -> list[int]:
    """`indices` in ascending order. Raises `ValueError` naming `name` for one out of range, doubled or no integer."""
    if not isinstance(indices, Iterable):
        raise ValueError(f"{name}={indices!r} must be a list of layer indices")
    indices = list(indices)
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_layers:
            raise ValueError(f"{name} holds {index!r}; a layer index is an integer from 0 to {num_layers - 1}")
    if len(set(indices)) != len(indices):
        raise ValueError(f"{name}={indices} names a layer twice")
    return sorted(indices)


def _beside_embedding(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Those of `names` that share most of their path with the token embedding's."""
    embedding = model.get_input_embeddings()
    path = next(name.split(".") for name, module in model.named_modules() if module is embedding)

    def shared(name: str) -> int:
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(name.split("."), path, strict=False)))

    most = max(map(shared, names), default=0)
    return [name for name in names if shared(name) == most]


def check_unquantised(name: str, model: PreTrainedModel, what: str) -> None:
    """Raises `ValueError` naming `name` for quantised weights, where `what` is done that only others allow."""
    if getattr(model, "is_quantized", False) or any(not weight.is_floating_point() for weight in model.parameters()):
        raise ValueError(
            f"{name} ({type(model).__name__}) is quantised, which forward passes, search and evaluate take; {what}"
        )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every submodule's own mode is restored after it."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


@contextmanager
def returning_dicts(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the parts of `model` give one another named outputs, also where `config.return_dict` is False:
    many models of transformers cannot run that way, whatever is passed to their forward."""
    configs = (model.config, model.config.get_text_config(decoder=True))
    asked = [config.return_dict for config in configs]
    for config in configs:
        config.return_dict = True
    try:
        yield
    finally:
        for config, value in zip(configs, asked, strict=True):
            config.return_dict = value


def _refuse_unfit(model: PreTrainedModel) -> None:
    kind = type(model).__name__
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise TypeError(f"model ({kind}) is PEFT-wrapped; pass merge_and_unload() of it, a plain model")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model ({kind}) is not a transformers PreTrainedModel; pass the model itself, unwrapped")
    if model.config.is_encoder_decoder:
        raise ValueError(f"model ({kind}) is an encoder-decoder; pass a decoder-only causal language model")
    if model.get_output_embeddings() is None or not model.can_generate():
        raise TypeError(f"model ({kind}) has no decoder stack with a language-model head; load AutoModelForCausalLM")
