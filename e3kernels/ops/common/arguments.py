"""Checks of arguments: each error names the argument, its value and what would be right.

Checks of values are left out where they would cost more than they give: while torch.compile traces (a check would
specialise the graph on the value), inside a function transform (which hides the values), and for tensors on a device
other than the CPU (reading them would wait for it) unless the environment's E3_CHECK_VALUES=1 asks for it.
"""

import math
import os

import torch
from torch import Tensor

from e3kernels.compat import inside_transform

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def code(name: str, value: str, choices: tuple[str, ...]) -> int:
    """The code of option `name`; ValueError for an unknown value."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
    return choices.index(value)


def check_number(
    name: str, value: float | Tensor, low: float, high: float = math.inf, *, open_low: bool = True
) -> None:
    """ValueError unless `value` is finite and low < value <= high, or low <= value where `open_low` is False."""
    if torch.compiler.is_compiling():
        return
    if isinstance(value, Tensor):
        value = value.item()
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        above = f"greater than {low}" if open_low else f"at least {low}"
        below = "" if high == math.inf else f" and at most {high}"
        raise ValueError(f"{name} is {value}; it must be finite, {above}{below}")


def check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """TypeError unless the tensor has one of `dtypes`."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be one of {', '.join(map(str, dtypes))}")


def last_size(name: str, tensor: Tensor) -> int:
    """The size of the last dimension; ValueError if there is none."""
    if not tensor.dim():
        raise ValueError(f"{name} is 0-dimensional; it must be (..., size)")
    return tensor.shape[-1]


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], because: str) -> None:
    """ValueError unless the tensor has `shape`; `because` says where that shape comes from."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}, {because}")


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """ValueError unless all tensors are on `device`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on {device} like the other tensors")


def checks_values(device: torch.device) -> bool:
    """Whether the values of tensors on `device` are checked."""
    if torch.compiler.is_compiling() or inside_transform():
        return False
    return device.type == "cpu" or os.environ.get("E3_CHECK_VALUES") == "1"


def check_range(name: str, values: Tensor, relevant: Tensor, size: int) -> None:
    """ValueError unless 0 <= values < size wherever `relevant`, where values are checked."""
    if not checks_values(values.device):
        return
    outside = values[relevant & ((values < 0) | (values >= size))]
    if outside.numel():
        raise ValueError(f"{name} holds {outside[0].item()}; values must be at least 0 and less than {size}")


def scalar_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The operators' `scalars`, on the CPU. While tracing it is computed inside the graph from the floats, so that a
    changed float is a changed input and not a new graph, and on `device`: a graph with a CPU tensor in it cannot become
    a CUDA graph."""
    if torch.compiler.is_compiling():
        one = torch.ones((), dtype=torch.float64, device=device)
        return torch.stack([one * value for value in values])
    return torch.tensor(values, dtype=torch.float64)


def rows_of(tensor: Tensor) -> Tensor:
    """(..., D) as (N, D) whose last dimension has stride 1; a view where possible."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
