"""Which backend serves an operation on a device, and why.

The choice for (operation, device type, dtype) never changes behind the caller's back: automatic choice takes the first
of the device's preferences that serves; a backend asked for by `use_backend` or E3_BACKEND that cannot serve raises.
A graph of torch.compile keeps the backend that was chosen when it was traced.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from e3kernels import native
from e3kernels.compat import constant_when_traced
from e3kernels.contract import BACKENDS
from e3kernels.registration import OPERATORS, define_overload

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Service:
    """The device types (None: all) and dtypes on which a backend serves an operation."""

    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]

    def refusal(self, device: str, dtype: torch.dtype) -> str | None:
        """Why it cannot serve; None where it can."""
        if self.devices is not None and device not in self.devices:
            return f"serves {', '.join(self.devices)} tensors, not {device}"
        if dtype not in self.dtypes:
            return f"serves {', '.join(map(str, self.dtypes))}, not {dtype}"
        return None


class Choice(NamedTuple):
    """The backend of an operation, and why it and not a faster one."""

    backend: str
    reason: str


services: dict[tuple[str, str], Service] = {}
unavailable = {"native": "not loaded", "triton": "no kernels are registered"}
_choices: dict[tuple[str | None, str, str, torch.dtype], Choice] = {}

_environment = os.environ.get("E3_BACKEND") or None
_chosen: ContextVar[str | None] = ContextVar("e3kernels_backend", default=None)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operation of this thread (or asyncio task) by backend `name` inside the `with` block.

    `name` is "reference", "native" or "triton"; ValueError for any other. An operation that the backend cannot serve
    raises RuntimeError when it is called.
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
    devices: tuple[str, ...] | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Let `backend` serve `operation` on `devices` (None: all) for inputs of `dtypes`.

    `forward` and `backward` are kernels with the operator's arguments; None where C++ has registered them.
    """
    define_overload(operation, _checked(backend, "backend"), forward, backward)
    services[backend, operation] = Service(devices, dtypes)
    unavailable.pop(backend, None)
    _choices.clear()


def _refusal(backend: str, operation: str, device: str, dtype: torch.dtype) -> str | None:
    service = services.get((backend, operation))
    if service is None:
        return unavailable.get(backend, f"does not have {operation}")
    return service.refusal(device, dtype)


def _choose(wanted: str | None, operation: str, device: str, dtype: torch.dtype) -> Choice:
    if wanted is not None:
        refusal = _refusal(wanted, operation, device, dtype)
        if refusal is not None:
            raise RuntimeError(f"backend {wanted!r} cannot serve {operation}: {refusal}")
        return Choice(wanted, "asked for")
    preferences = ("native" if device == "cpu" else "triton", "reference")
    refusals: list[str] = []
    for backend in preferences:
        refusal = _refusal(backend, operation, device, dtype)
        if refusal is None:
            return Choice(backend, "; ".join(refusals) or f"preferred on {device}")
        refusals.append(f"{backend}: {refusal}")
    raise RuntimeError(f"no backend can serve {operation}: {'; '.join(refusals)}")


def choose(operation: str, device: str, dtype: torch.dtype) -> Choice:
    """The backend of `operation` for a device type and input dtype, with the reason.

    Raises RuntimeError if the backend asked for cannot serve, ValueError if E3_BACKEND names none.
    """
    key = (requested(), operation, device, dtype)
    choice = _choices.get(key)
    if choice is None:
        choice = _choices[key] = _choose(*key)
    return choice


@constant_when_traced
def resolve(operation: str, device: str, dtype: torch.dtype) -> str:
    """The name of the backend that `choose` chooses."""
    return choose(operation, device, dtype).backend


def load() -> None:
    """Register the reference kernels, the compiled ones beside this file if they load, and the Triton kernels."""
    for operation in OPERATORS:
        room = "tiled" if operation.startswith("linear_") else "reference"  # tile by tile: memory stays bounded
        module = importlib.import_module(f"e3kernels.{room}.{operation}")
        forward, backward = getattr(module, operation), getattr(module, f"{operation}_backward")
        register("reference", operation, forward, backward, devices=None, dtypes=(*FLOATS, torch.float64))
    _load_native()
    _load_triton()


def native_isa() -> str | None:
    """The instruction set of the compiled kernels; None where they are not loaded."""
    return None if "native" in unavailable else native.isa()


def _load_native() -> None:
    reason = native.load()
    if reason is not None:
        unavailable["native"] = reason
        return
    for operation, forward, backward in native.native_kernels():
        register("native", operation, forward, backward, devices=("cpu",), dtypes=FLOATS)


def _load_triton() -> None:
    """Register the Triton kernels for the devices that there are; CPU tensors only under Triton's interpreter."""
    devices = [name for name in ("cuda", "xpu") if getattr(torch, name).is_available()]
    if os.environ.get("TRITON_INTERPRET") == "1":
        devices.append("cpu")
    if importlib.util.find_spec("triton") is None:
        unavailable["triton"] = "the package triton is not installed"
    elif not devices:
        unavailable["triton"] = "no CUDA, ROCm or XPU device (TRITON_INTERPRET=1 runs the kernels on CPU tensors)"
    else:
        importlib.import_module("e3kernels.triton").load(register, tuple(devices), FLOATS)
