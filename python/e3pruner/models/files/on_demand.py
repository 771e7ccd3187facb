"""Checkpoint folders whose model is never in memory: empty ones, and such that read each layer when it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from e3pruner.compat import fill, filled, quantizer_of, without_progress
from e3pruner.models.files.names import TensorNames
from e3pruner.models.files.shards import Shard, read_shards
from e3pruner.models.layer_calls import Arguments, replaced
from e3pruner.models.stack import find_layers


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a checkpoint folder; code that it brings runs only if that is trusted."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=trust_remote_code
    )
    return config


def empty_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that `config` describes in evaluation mode, unquantised, its parameters on the meta device.

    Of the class that the checkpoint was saved from, where transformers has it; else its causal language model. Raises
    ValueError for a configuration that describes none.
    """
    names = config.architectures or []
    own = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    options: dict[str, Any] = {"dtype": config.dtype or torch.float32}
    try:
        with init_empty_weights(include_buffers=False):
            if own and issubclass(own[0], PreTrainedModel) and not getattr(config, "auto_map", None):
                model: PreTrainedModel = own[0]._from_config(config, **options)
            else:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)
            model.eval()
            return model
    except Exception as error:
        raise ValueError(f"model {config.name_or_path} cannot be loaded: {type(error).__name__}: {error}") from error


def check_complete(folder: Path, model: PreTrainedModel, shards: Sequence[Shard]) -> None:
    """Raises ValueError unless the tensors of `shards`, which are in `folder`, are those of the `empty_model` there, by
    name and shape. It is loaded for that, without its bytes. Of quantised weights nothing is known."""
    if getattr(model.config, "quantization_config", None):
        return
    tensors = {
        name: torch.empty(tensor.entry["shape"], dtype=model.dtype, device="meta")
        for shard in shards
        for name, tensor in shard.tensors.items()
    }
    try:
        with without_progress():
            fill(model, tensors, model.dtype, device="meta")
    except ValueError as error:
        raise ValueError(f"model {folder}: {error}") from error
    model.tie_weights()
    if missing := [name for name, parameter in model.named_parameters() if not filled(parameter)]:
        raise ValueError(
            f"model {folder}: {len(missing)} tensors that its config.json asks for are not in its weights: {missing[0]}"
            f"{', ...' if missing[1:] else ''}"
        )


@contextmanager
def on_demand(folder: Path, trust_remote_code: bool = False) -> Iterator[PreTrainedModel]:
    """The model of a checkpoint `folder` whose layers are read when they are called and let go after.

    What is no layer is mapped, not copied, where the checkpoint has it as the model does. Inside the block only: the
    model's parameters are on the meta device, except there and then.

    Raises what transformers raises where it cannot read quantised weights here (see `quantizer_of`); ValueError for a
    checkpoint that lacks tensors, by name.
    """
    config, shards = read_config(folder, trust_remote_code), read_shards(folder)
    quantizer = quantizer_of(config)
    model = empty_model(config, trust_remote_code)
    dtype = model.dtype
    if quantizer is not None:
        quantizer.preprocess_model(
            model=model,
            dtype=dtype,
            device_map={"": "cpu"},
            checkpoint_files=[str(shard.file) for shard in shards],
            use_kernels=False,
        )
    names, layers = TensorNames(model, quantizer), find_layers(model)
    with ExitStack() as stack:
        stack.enter_context(without_progress())
        parts: dict[int | None, dict[str, Any]] = {}
        for shard in shards:
            opened = stack.enter_context(safe_open(shard.file, framework="pt"))
            for name in sorted(shard.tensors):
                layer = names.layer_of(name)
                parts.setdefault(layer.layer if layer else None, {})[name] = opened.get_slice(name)
        fill(model, parts[None], dtype, quantizer)
        model.tie_weights()
        _check_filled(model, set(model.modules()) - set(layers.modules()))

        def run(index: int, arguments: Arguments, own: Callable[[Arguments], Any]) -> Any:
            with _kept(layers[index]):
                fill(model, parts[index], dtype, quantizer)
                _check_filled(model, set(layers[index].modules()))
                return own(arguments)

        stack.enter_context(replaced(dict(enumerate(layers)), run))
        yield model


@contextmanager
def _kept(layer: nn.Module) -> Iterator[None]:
    """After the block every module of `layer` has the parameters and buffers that it had before."""
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in layer.modules()]
    try:
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _check_filled(model: PreTrainedModel, modules: set[nn.Module]) -> None:
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items() if module in modules else ():
            if parameter is not None and parameter.is_meta:
                raise ValueError(f"model ({model.config.model_type}): its checkpoint lacks {name}.{leaf}")
