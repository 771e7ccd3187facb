"""Which type a model computes in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

PRECISIONS = ("auto", "bf16", "fp32")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype that `precision` computes in on `device`; None: the weights' own.

    "auto" is "bf16" where the processor multiplies bfloat16, else "fp32". Raises `ValueError` for any other name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} must be one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        precision = "bf16" if _multiplies_bf16(device) else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def weights_in(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None) -> Iterator[None]:
    """Inside the block `parameters` are rounded to `dtype` (None: they are not); then the very same tensors are back.

    For passes without a gradient. It takes the memory of autocast's copies of the weights and about half its time:
    norms and residual stream are narrow too.
    """
    own = [(p, p.data) for p in parameters if p.is_floating_point()] if dtype is not None else []
    try:
        for parameter, data in own:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in own:
            parameter.data = data
