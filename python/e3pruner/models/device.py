"""Where models run."""

from __future__ import annotations

import torch

AUTO = "auto"


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
