"""Checks of hidden states and the output head that turns them into logits."""

import torch
from torch import Tensor

from e3kernels.ops.common.arguments import FLOAT_DTYPES, check_dtype, check_shape, last_size


def autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """The dtype in which a linear operation multiplies under autocast; None outside it and for float64."""
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def check_head(
    model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    """TypeError or ValueError unless hidden (..., H), weight (V, H) and bias (V,) of `model` fit together."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_dtype(f"{model}_{name}", tensor, dtypes)
    width = last_size(f"{model}_hidden", hidden)
    vocabulary = weight.shape[0] if weight.dim() else 0
    check_shape(f"{model}_weight", weight, (vocabulary, width), f"V times the width of {model}_hidden")
    if bias is not None:
        check_shape(f"{model}_bias", bias, (vocabulary,), f"one value per row of {model}_weight")


def head_dtypes(hidden: Tensor, compute_dtype: torch.dtype | None) -> tuple[torch.dtype, ...]:
    """The dtypes that the heads of a loss may have: one without autocast, any that autocast casts with it."""
    check_dtype("student_hidden", hidden, FLOAT_DTYPES)
    return (hidden.dtype,) if compute_dtype is None else FLOAT_DTYPES[:3]
