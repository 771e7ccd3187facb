"""Every private or version-dependent name of torch and triton that e3kernels touches; tested with torch 2.11, 2.13 and
2.15, and their Tritons, 3.6 to 3.9."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.triton import (
    get_inner_triton_kernels,
    is_wrap_triton_enabled,
    set_wrap_triton_enabled,
    triton_ops_to_kernels,
)
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd.forward_ad import _set_fwd_grad_enabled

__all__ = [
    "FunctionalTensorMode",
    "apply_at_this_level",
    "below_autograd",
    "constant_when_traced",
    "device_keys",
    "export_keeps_operators",
    "get_inner_triton_kernels",
    "graph_is_kept",
    "has_kernel",
    "inside_transform",
    "is_batched",
    "is_eager",
    "is_observed",
    "is_wrap_triton_enabled",
    "outer_levels_differentiate",
    "profiler_is_on",
    "set_wrap_triton_enabled",
    "triton_ops_to_kernels",
    "wrap_triton",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def has_kernel(overload: str) -> bool:
    """Whether a kernel is registered under `overload`, as "e3::entropy_kl.native", defined or not."""
    return torch._C._dispatch_has_kernel(overload)


def wrap_triton(kernel: Any) -> Any:
    """torch.library.wrap_triton; a kernel of Triton's interpreter as it is, which torch 2.11 refuses."""
    return kernel if type(kernel).__module__ == "triton.runtime.interpreter" else torch.library.wrap_triton(kernel)


def constant_when_traced(function: Function) -> Function:
    """Let torch.compile call `function` while it traces and keep the result: torch.compiler.assume_constant_result,
    which would import torch._dynamo, a second's work."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def profiler_is_on() -> bool:
    """Whether the autograd profiler records."""
    return torch._C._autograd._profiler_enabled()


def is_observed() -> bool:
    """Whether a dispatch mode or the autograd profiler would have to see an operator that is called now."""
    return profiler_is_on() or bool(torch._C._len_torch_dispatch_stack())


def device_keys(device: str) -> Any:
    """The dispatch keys by which an operator is redispatched to its kernel for a device type."""
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))


def export_keeps_operators() -> bool:
    """Whether torch.export is at work and wants operators left whole."""
    from torch.export._trace import custom_triton_ops_decomposition_disabled  # torch.export is a second's import

    return bool(custom_triton_ops_decomposition_disabled())


def inside_transform() -> bool:
    """Whether a function transform (torch.func.grad, vmap, …) is at work."""
    return torch._C._are_functorch_transforms_active()


def below_autograd() -> AbstractContextManager[None]:
    """Calls inside go to an operator's kernel, past its autograd formula."""
    return torch._C._AutoDispatchBelowAutograd()  # type: ignore[no-any-return]


def apply_at_this_level(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply` from a kernel of an operator's Autograd key, which serves one level of function transforms: the
    operator that its forward calls is dispatched to the next."""
    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


@contextmanager
def outer_levels_differentiate() -> Iterator[None]:
    """In the forward of an autograd function that is applied at one level of function transforms: it turned gradients
    off for its own level, but what is called inside belongs to the others."""
    if inside_transform():
        with torch.enable_grad(), _set_fwd_grad_enabled(True):
            yield
    else:
        yield


def graph_is_kept() -> bool:
    """Whether the backward pass that runs now leaves the graph for another one."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def is_batched(tensor: Tensor) -> bool:
    """Whether a function transform or batched gradients (torch.autograd.grad(is_grads_batched=True), which has none of
    its device's keys) may wrap `tensor`: its kernel cannot read it."""
    key = getattr(torch._C.DispatchKey, tensor.device.type.upper())
    return inside_transform() or not torch._C._dispatch_keys(tensor).has(key)


def is_eager(tensor: Tensor) -> bool:
    """Whether `tensor` has memory of its own: none of a subclass, as tracing has them, or that a transform wraps."""
    return type(tensor) is Tensor and not is_batched(tensor)
