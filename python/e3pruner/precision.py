"""Which type a model computes in."""

from __future__ import annotations

import torch

PRECISIONS = ("auto", "bf16", "fp32")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of `precision`'s autocast on `device`; None: no autocast, the weights' own type.

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
