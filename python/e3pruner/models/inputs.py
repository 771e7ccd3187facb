"""What a model is given beside tokens: images, sound, and what says which tokens stand for these."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# What every batch is read for, or that a caller sets.
_OWN = {"input_ids", "attention_mask", "position_ids", "labels", "rows"}
_PLACEHOLDER = re.compile("(image|video|audio)_token_(id|index)")


def extras_for(name: str, batch: Mapping[str, Any], models: Mapping[str, PreTrainedModel]) -> dict[str, Tensor]:
    """What `batch` holds beside tokens that the forward pass of `models` takes; what none takes is left out.

    `models`, by the names of the arguments that they are. Raises ValueError naming `name` and the entry for one that
    some of them take and another does not, and for one of floating-point numbers, an image or a sound, that none does.
    """
    extras = {}
    for key in (key for key, value in batch.items() if key not in _OWN and value is not None):
        deaf = [f"{role} ({each.config.model_type})" for role, each in models.items() if not _takes(each, key)]
        if len(deaf) == len(models) and not _floating(batch[key]):
            continue
        if deaf:
            raise ValueError(f"{name} holds {key}, which {' and '.join(deaf)} cannot read")
        extras[key] = torch.as_tensor(batch[key])
    return extras


def placeholders(model: PreTrainedModel) -> list[int]:
    """The tokens that stand for parts of an image, a video or a sound."""
    found = {value for name, value in vars(model.config).items() if _PLACEHOLDER.fullmatch(name)}
    return sorted(value for value in found if isinstance(value, int))


def _takes(model: PreTrainedModel, name: str) -> bool:
    """Whether a forward pass takes this argument, itself or for the model within."""
    own, within = (inspect.signature(type(each).forward).parameters for each in (model, model.base_model))
    return name in own or ("kwargs" in own and name in within)


def _floating(value: Any) -> bool:
    try:
        return torch.as_tensor(value).is_floating_point()
    except (ValueError, TypeError, RuntimeError):  # text, say
        return False
