"""Where models run."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from e3pruner.models.head import last_hidden
from e3pruner.models.stack import evaluating, speaker_of
from e3pruner.models.streaming import computing_in
from e3pruner.precision import autocast_dtype

AUTO = "auto"
_RUNS_ROUNDED: WeakKeyDictionary[PreTrainedModel, dict[torch.dtype, str | None]] = WeakKeyDictionary()


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


def rounded_dtype(model: PreTrainedModel, precision: str) -> torch.dtype | None:
    """`autocast_dtype` for `computing_in`: the dtype that the weights of `model` are rounded to; None: their own.

    Some models cannot run so, because they compute or keep something in fp32 beside narrow weights; "auto" is "fp32"
    for them. Raises `ValueError` where "bf16" is asked for, or for another name.
    """
    dtype = autocast_dtype(precision, model.device)
    if dtype is None:
        return None
    known = _RUNS_ROUNDED.setdefault(model, {})
    if dtype not in known:
        known[dtype] = _complaint(model, dtype)
    if known[dtype] is None:
        return dtype
    if precision != "auto":
        kind = model.config.model_type
        raise ValueError(f"precision={precision!r}: model ({kind}) does not run with rounded weights: {known[dtype]}")
    return None


def _complaint(model: PreTrainedModel, dtype: torch.dtype) -> str | None:
    """What `model` says on a few tokens with its weights rounded to `dtype`; None: it runs."""
    try:
        with torch.no_grad(), evaluating(model), computing_in(model, dtype):
            last_hidden(speaker_of(model), torch.arange(8, device=model.device)[None])
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None
