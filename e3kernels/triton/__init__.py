"""Every operation as Triton kernels, for CUDA, ROCm and XPU tensors; under TRITON_INTERPRET=1 for CPU tensors too.

`load` registers the overloads `e3::<op>.triton` the way `torch.library.triton_op` registers a whole operator: eager
calls launch directly, and where AOTAutograd functionalises, the launches are traced into the graph, so that the
compiler sees them. Two kinds stay one node: the linear losses, whose loop over tiles would be unrolled, and
`gumbel_topk`, whose bits depend on a compile option (no fused multiply-adds) that a traced launch cannot carry. Under
the interpreter all of them do: a launch that is run by Python cannot be traced.
"""

import importlib
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from e3kernels.compat import (
    FunctionalTensorMode,
    export_keeps_operators,
    get_inner_triton_kernels,
    set_wrap_triton_enabled,
    triton_ops_to_kernels,
)
from e3kernels.registration import LIBRARY, OPERATORS
from e3kernels.triton.on_chip import ADDED_ROWS as ADDED_ROWS
from e3kernels.triton.on_chip import TILE_LOGITS as TILE_LOGITS

Kernel = Callable[..., Any]
TRACED = ("entropy_kl", "topk_kl", "gated_residual")


def eager(kernel: Kernel) -> Kernel:
    """`kernel` launched directly, on its tensors' device."""

    def launch(*arguments: Any) -> Any:
        device = arguments[0].device
        guard = nullcontext() if device.index is None else torch.accelerator.device_index(device.index)
        with set_wrap_triton_enabled(False), guard:
            return kernel(*arguments)

    return launch


def _trace(overload: str, kernel: Kernel) -> None:
    """Let functionalisation see the launches inside `overload`; torch.export keeps the operator, which serialises."""

    def decompose(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if export_keeps_operators():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return kernel(*args, **kwargs)

    triton_ops_to_kernels[overload] = get_inner_triton_kernels(kernel)
    torch.library.register_torch_dispatch(overload, FunctionalTensorMode, decompose, lib=LIBRARY)


def load(register: Callable[..., None], devices: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Register the kernels of every operation by `register`, which is `backends.register`."""
    for operation in OPERATORS:
        module = importlib.import_module(f"e3kernels.triton.{operation}")
        names = operation, f"{operation}_backward"
        kernels = [getattr(module, name) for name in names]
        register("triton", operation, *map(eager, kernels), devices=devices, dtypes=dtypes)
        if operation in TRACED and os.environ.get("TRITON_INTERPRET") != "1":
            for name, kernel in zip(names, kernels, strict=True):
                _trace(f"e3::{name}.triton", kernel)
