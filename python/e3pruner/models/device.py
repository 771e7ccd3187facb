"""Where models run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from e3pruner.models.head import last_hidden
from e3pruner.models.stack import evaluating, speaker_of
from e3pruner.models.streaming import computing_in
from e3pruner.precision import autocast_dtype

AUTO = "auto"
# What a model said, by the dtype and what it was given.
_RUNS_ROUNDED: WeakKeyDictionary[PreTrainedModel, dict[Any, str | None]] = WeakKeyDictionary()


def usable_device(name: str = AUTO) -> torch.device:
    """The device of this name; "auto" is the first CUDA or ROCm device, else the first XPU, else the CPU.

    Raises `ValueError` for what is no device, or none on which this process can compute.
    """
    if name == AUTO:
        return torch.device(next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), "cpu"))
    try:
        device = torch.device(name)
        torch.ones(1, device=device).add(1).item()
    except (RuntimeError, NotImplementedError, AssertionError, ImportError, AttributeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].removesuffix(".")
        raise ValueError(f"device={name!r} cannot be used here: {reason}; auto takes what there is") from error
    return device


def rounded_dtype(
    model: PreTrainedModel, precision: str, inputs: Mapping[str, Tensor] | None = None
) -> torch.dtype | None:
    """`autocast_dtype` for `computing_in`: the dtype that the weights of `model` are rounded to; None: their own.

    Some models cannot run so, because they compute or keep something in fp32 beside narrow weights; "auto" is "fp32"
    for them. It is tried on `inputs`, which hold images where the model shall see some, else on a few tokens. Raises
    `ValueError` where "bf16" is asked for, or for another name.
    """
    dtype = autocast_dtype(precision, model.device)
    if dtype is None:
        return None
    known = _RUNS_ROUNDED.setdefault(model, {})
    key = dtype, frozenset(inputs or ())
    if key not in known:
        known[key] = _complaint(model, dtype, inputs)
    if known[key] is None:
        return dtype
    if precision != "auto":
        kind = model.config.model_type
        raise ValueError(f"precision={precision!r}: model ({kind}) does not run with rounded weights: {known[key]}")
    return None


def _complaint(model: PreTrainedModel, dtype: torch.dtype, inputs: Mapping[str, Tensor] | None) -> str | None:
    """What `model` says on `inputs` or a few tokens with its weights rounded to `dtype`; None: it runs."""
    try:
        with torch.no_grad(), evaluating(model), computing_in(model, dtype):
            if inputs is None:
                last_hidden(speaker_of(model), torch.arange(8, device=model.device)[None])
            else:
                last_hidden(model, **{name: value.to(model.device) for name, value in inputs.items()})
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None
