"""A device without hardware: meta tensors, whose memory nobody can read, with the values kept beside them on the CPU.

Within `FakeDevice` every operator of a meta tensor is computed on those values, also where C++ calls it, and what is
copied from the device to the host is counted. Code that reads device memory by its address reads a null pointer.
"""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

META = torch.device("meta")
aten = torch.ops.aten


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """What the tensor holds, on the CPU."""
    return tensor.__dict__["values"] if tensor.device == META else tensor


def on_device(values: torch.Tensor) -> torch.Tensor:
    """A tensor of the device that holds `values`."""
    tensor = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=META)
    tensor.__dict__["values"] = values
    return tensor


def move(model: nn.Module) -> nn.Module:
    """The model, its parameters and buffers on the device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                values = parameter.detach()
                module._parameters[name] = nn.Parameter(on_device(values), requires_grad=False)
                module._parameters[name].__dict__["values"] = values
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = on_device(buffer)
    return model


class FakeDevice(TorchDispatchMode):
    """`to_host` lists the elements of every copy to the host, `dtypes` those of what comes to be on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.to_host: list[int] = []
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        from_device = any(tensor.device == META for tensor in tensors)
        device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        args, kwargs = tree_map_only(torch.Tensor, values_of, (args, kwargs))
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        out = function(*args, **kwargs)
        if from_device and (function is aten._local_scalar_dense.default or device == torch.device("cpu")):
            self.to_host.append(args[0].numel())
            return out
        if not from_device and device != META:
            return out
        self.dtypes += [leaf.dtype for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        inputs = {id(values_of(tensor)): tensor for tensor in tensors}  # an operator in place returns one of them
        return tree_map_only(
            torch.Tensor, lambda values: inputs[id(values)] if id(values) in inputs else on_device(values), out
        )
