"""Which backend serves an operation on a device, and why.

The choice for (operation, device type, dtype) is made once and never changes behind the caller's back: automatic choice
takes the first of the device's preferences that serves; a backend asked for by `use_backend` or E3_BACKEND that cannot
serve raises.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from e3kernels.ops.registration import OPERATORS, define_overload

BACKENDS = ("reference", "native", "triton")


@dataclass(frozen=True)
class Service:
    """The device types and dtypes on which a backend serves an operation; no devices means all."""

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


_services: dict[tuple[str, str], Service] = {}
_unavailable = {"native": "not loaded", "triton": "not loaded"}
_resolved: dict[tuple[str | None, str, str, torch.dtype], tuple[str, str]] = {}


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


_environment = os.environ.get("E3_BACKEND") or None
_chosen: ContextVar[str | None] = ContextVar("e3kernels_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operation of this thread (or task) by backend `name` inside the `with` block.

    Raises ValueError for an unknown name; an operation that the backend cannot serve raises RuntimeError when called.
    """
    token = _chosen.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def requested() -> str | None:
    """The backend asked for by `use_backend`, else by E3_BACKEND; None leaves the choice to the device."""
    chosen = _chosen.get()
    if chosen is None and _environment is not None:
        return _checked(_environment, "E3_BACKEND")
    return chosen


def register(
    backend: str,
    operation: str,
    forward: Callable[..., Any] | None,
    backward: Callable[..., Any] | None,
    *,
    devices: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Let `backend` serve `operation` on `devices` (empty: all) for inputs of `dtypes`.

    `forward` and `backward` are the kernels with the operator's arguments; None where C++ has registered them.
    """
    define_overload(operation, _checked(backend, "backend"), forward, backward)
    _services[backend, operation] = Service(devices, dtypes)
    _unavailable.pop(backend, None)
    _resolved.clear()


def load_native() -> None:
    """Load the compiled operators beside this file and let `native` serve those that they hold; record why not."""
    modules = sorted(Path(__file__).parent.glob("_ops*.so"))
    if not modules:
        _unavailable["native"] = "no compiled module e3kernels/_ops*.so: it was not built"
        return
    try:
        torch.ops.load_library(str(modules[0]))
    except OSError as error:
        _unavailable["native"] = f"{modules[0].name} cannot be loaded: {error}"
        return
    for operation in OPERATORS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"e3::{operation}.native", "CPU"):
            dtypes = (torch.float32, torch.bfloat16, torch.float16)
            register("native", operation, None, None, devices=("cpu",), dtypes=dtypes)
