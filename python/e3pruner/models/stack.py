"""Find the decoder stack of a Hugging Face causal language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

# What a configuration calls the number of its decoder's layers; beside an encoder's number, that of the decoder counts.
_COUNTS = ("decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers")


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of `model`, in order: the stack that every part of this package gates, skips and slices.

    It is the `nn.ModuleList` of as many modules as the configuration names decoder layers that sits where the token
    embedding does: a vision or audio tower may have as many layers, and has no tokens. Where several lists do, it is
    the one of `GradientCheckpointingLayer`s.

    Raises `TypeError` for anything but a Hugging Face causal language model, PEFT-wrapped models included, and
    `ValueError` for encoder-decoders and models without exactly one such stack.
    """
    return cast(nn.ModuleList, model.get_submodule(stack_name(model)))


def stack_name(model: PreTrainedModel) -> str:
    """The qualified name of the decoder stack within `model`; the same errors as `find_layers`."""
    _refuse_unfit(model)
    config = model.config.get_text_config(decoder=True)
    setting = count_setting(config)
    count = getattr(config, setting, 0)
    towers = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and module.main_input_name == "pixel_values" and module is not model
    ]
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count > 0 and not name.startswith(tuple(towers))
    }
    names = _beside_embedding(model, lists)
    usual = [name for name in names if all(isinstance(layer, GradientCheckpointingLayer) for layer in lists[name])]
    names = usual or names
    if len(names) != 1:
        found = ", ".join(names) or "none"
        if not count:
            kind = type(model).__name__
            if hasattr(config, setting):
                raise ValueError(f"model ({kind}): its configuration counts no layer, {setting}={count}")
            raise ValueError(f"model ({kind}) has several stacks, and its configuration counts none alone")
        raise ValueError(
            f"model ({type(model).__name__}) has no decoder stack that can be told apart: expected one ModuleList of "
            f"{count} decoder layers ({setting}), found {found}"
        )
    return names[0]


def count_setting(config: PreTrainedConfig) -> str:
    """The setting of a text configuration that says how many decoder layers there are."""
    return next((name for name in _COUNTS if hasattr(config, name)), _COUNTS[-1])


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The smallest module that holds both the decoder layers and the token embedding."""
    return model.get_submodule(_common(stack_name(model).split("."), _embedding_path(model)))


def speaker_of(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model that runs on tokens alone: `model`, or the one within where that asks for an image."""
    if model.main_input_name == "input_ids":
        return model
    head = model.get_output_embeddings()
    within = (module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model)
    return next((each for each in within if each.get_output_embeddings() is head), model)


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


def _beside_embedding(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those of `names` that share most of their path with the token embedding's."""
    path = _embedding_path(model)
    shared = {name: len(_common(name.split("."), path)) for name in names}
    return [name for name in shared if shared[name] == max(shared.values())]


def _embedding_path(model: PreTrainedModel) -> list[str]:
    embedding = model.get_input_embeddings()
    return next(name.split(".") for name, module in model.named_modules() if module is embedding)


def _common(path: list[str], other: list[str]) -> str:
    """What two qualified names begin with."""
    return ".".join(part for part, _ in takewhile(lambda pair: pair[0] == pair[1], zip(path, other, strict=False)))


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
def calling(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block the forward of `module` is `forward`; afterwards it is what it was, other hooks included."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


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


def _holds_adapters(model: nn.Module) -> bool:
    """Whether PEFT's modules are in `model`; its mark alone does not tell, which PEFT 0.18 leaves on a merged model."""
    marked = hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
    return marked and any(kind.__module__.startswith("peft.") for m in model.modules() for kind in type(m).__mro__)


def _refuse_unfit(model: PreTrainedModel) -> None:
    kind = type(model).__name__
    if _holds_adapters(model):
        raise TypeError(f"model ({kind}) is PEFT-wrapped; pass merge_and_unload() of it, a plain model")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model ({kind}) is not a transformers PreTrainedModel; pass the model itself, unwrapped")
    if model.config.is_encoder_decoder:
        raise ValueError(f"model ({kind}) is an encoder-decoder; pass a decoder-only causal language model")
    if (head := model.get_output_embeddings()) is None or not model.can_generate():
        raise TypeError(f"model ({kind}) has no decoder stack with a language-model head; load AutoModelForCausalLM")
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise ValueError(f"model ({kind}) has an output head without one matrix ({type(head).__name__})")
