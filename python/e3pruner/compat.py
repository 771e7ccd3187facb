"""What is version-dependent in transformers: the name of a model's key-value cache, how a configuration says which
layers share keys and values, and how a checkpoint is read.

Tried with transformers 5.17, 5.23 and 5.24.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import AutoQuantizationConfig, get_hf_quantizer
from transformers.utils import logging

_OLD = "past_key_values"

# The argument of a model's forward pass and the field of its output: "cache" from transformers 5.24 on.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else _OLD

# Both: models still take the old name, and rename it after every hook has seen it.
CACHE_NAMES = ("cache", _OLD)


def sharing_modes(text: PreTrainedConfig) -> list[str]:
    """Of every layer "store" if later ones of its kind read its keys and values, "reuse…" if it reads such, else
    "None"; [] where none does. Older transformers say no more than how many layers, the last ones, read.
    """
    modes, readers = getattr(text, "kv_sharing_modes", None), getattr(text, "num_kv_shared_layers", 0)
    if modes is None and readers:
        kinds: list[str] = text.layer_types
        first = len(kinds) - readers
        last = {kind: layer for layer, kind in enumerate(kinds[:first])}
        modes = ["reuse" if n >= first else "store" if last[kind] == n else None for n, kind in enumerate(kinds)]
    return [str(mode) for mode in modes or ()]


def quantizer_of(config: PreTrainedConfig) -> Any:
    """What reads the quantised weights that `config` describes, on the CPU; None where none are quantised.

    A format that can be dequantised as it is read will be: its kernels want a GPU. `config` says so afterwards. Raises
    what transformers raises where it cannot: ImportError for a missing package, RuntimeError without a GPU.
    """
    settings = getattr(config, "quantization_config", None)
    if settings and hasattr(AutoQuantizationConfig.from_dict(settings), "dequantize"):
        config.quantization_config = settings | {"dequantize": True}
    return get_hf_quantizer(config, None, {"": "cpu"}, True, {})[0]


@contextmanager
def without_progress() -> Iterator[None]:
    """Inside the block transformers shows no bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class NameConversion:
    """From the names of tensors in a checkpoint of `model` to those in the model."""

    def __init__(self, model: PreTrainedModel, quantizer: Any) -> None:
        self.tensors = model.state_dict()
        self._prefix = model.base_model_prefix
        table = get_model_conversion_mapping(model, None, quantizer)
        self._renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in table if isinstance(entry, WeightConverter)]

    def __call__(self, name: str) -> str:
        renamed, _ = rename_source_key(name, self._renamings, self._converters, self._prefix, self.tensors)
        if renamed not in self.tensors and name in self.tensors:  # it is the model's already
            renamed, _ = rename_source_key(name, [], [], self._prefix, self.tensors)
        return renamed


def fill(
    model: PreTrainedModel,
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    quantizer: Any = None,
    device: str = "cpu",
) -> None:
    """Gives `model` the `tensors` of a checkpoint, or slices of them, named as there; what else it holds stays.

    Raises ValueError for tensors that do not fit, by name.
    """
    table: Any = get_model_conversion_mapping(model, None, quantizer)
    options = LoadStateDictConfig(
        device_map={"": torch.device(device)},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        hf_quantizer=quantizer,
        weight_mapping=table,
    )
    found, _ = convert_and_load_state_dict_in_model(model, dict(tensors), options)
    wrong = [*(f"{name}: {error}" for name, error in found.conversion_errors.items()), *found.error_msgs]
    wrong += [
        f"{name} has the shape {tuple(has)}, not {tuple(needs)}" for name, has, needs in sorted(found.mismatched_keys)
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not fit config.json: {wrong[0]}")


def filled(parameter: Tensor) -> bool:
    """Whether `fill` has given the model this parameter."""
    return getattr(parameter, "_is_hf_initialized", False)


def trainer_being_made() -> Any:
    """The `Trainer` whose constructor is calling its callbacks' `on_init_end`, which are not told."""
    from transformers import Trainer

    frame = sys._getframe(1)
    while not isinstance(found := frame.f_locals.get("self"), Trainer):
        if frame.f_back is None:
            raise RuntimeError("no transformers.Trainer is being made")
        frame = frame.f_back
    return found
