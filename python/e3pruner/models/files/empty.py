"""The model that a checkpoint folder describes, without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from e3pruner.compat import fill, filled, without_progress
from e3pruner.models.files.shards import Shard


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
        _renew_buffers(model)
        model.eval()
        return model
    except Exception as error:
        raise ValueError(f"model {config.name_or_path} cannot be loaded: {type(error).__name__}: {error}") from error


@torch.no_grad()
def _renew_buffers(model: PreTrainedModel) -> None:
    """What no checkpoint holds (sines and cosines) is computed again as transformers does behind loading: in fp32,
    whatever the dtype that the model was made in."""
    for module in model.modules():
        if module._non_persistent_buffers_set and not module._parameters:
            model._init_weights(module)


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
