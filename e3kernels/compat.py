"""Every private or version-dependent name of torch and triton that e3kernels touches; tested with torch 2.13 and
triton 3.9."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._library.triton import (
    get_inner_triton_kernels,
    is_wrap_triton_enabled,
    set_wrap_triton_enabled,
    triton_ops_to_kernels,
)
from torch._subclasses.functional_tensor import FunctionalTensorMode

__all__ = [
    "FunctionalTensorMode",
    "constant_when_traced",
    "device_keys",
    "export_keeps_operators",
    "get_inner_triton_kernels",
    "has_cpu_kernel",
    "is_observed",
    "is_wrap_triton_enabled",
    "set_wrap_triton_enabled",
    "triton_ops_to_kernels",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def has_cpu_kernel(overload: str) -> bool:
    """Whether a kernel is registered for CPU tensors under `overload`, as "e3::entropy_kl.native"."""
    registered = torch._C._dispatch_has_kernel(overload)
    return registered and torch._C._dispatch_has_kernel_for_dispatch_key(overload, "CPU")


def constant_when_traced(function: Function) -> Function:
    """Let torch.compile call `function` while it traces and keep the result: torch.compiler.assume_constant_result,
    which would import torch._dynamo, a second's work."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_observed() -> bool:
    """Whether a dispatch mode or the autograd profiler would have to see an operator that is called now."""
    return torch.autograd._profiler_enabled() or bool(torch._C._len_torch_dispatch_stack())


def device_keys(device: str) -> Any:
    """The dispatch keys by which an operator is redispatched to its kernel for a device type."""
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))


def export_keeps_operators() -> bool:
    """Whether torch.export is at work and wants operators left whole."""
    from torch.export._trace import custom_triton_ops_decomposition_disabled  # torch.export is a second's import

    return custom_triton_ops_decomposition_disabled()
