"""Which backend serves an operation on a device, and why.

The choice for (operation, device type, dtype) never changes behind the caller's back: automatic choice takes the first
of the device's preferences that serves; a backend asked for by `use_backend` or E3_BACKEND that cannot serve raises.
A graph of torch.compile keeps the backend that was chosen when it was traced.
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from e3kernels.contract import BACKENDS
from e3kernels.registration import OPERATORS, define_overload
from e3kernels.tiled.linear import Products, TileKernel, kernels, linear_grad_hidden, linear_logits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Logits of student (which its gradient replaces) and teacher in fp32 are 8 bytes a pair: 56 MiB.
_NATIVE_TILE_LOGITS = 7 << 20
# Dtypes for which an instruction set has products of its own, and the rows of a tile up to which they are the faster
# ones: torch's pack the head, which pays with more rows where its products run on tiles of their own.
_NATIVE_PRODUCTS = {
    "avx512": ((torch.float32,), 288),
    "avx512_bf16": ((torch.float32, torch.bfloat16), 1024),
    "amx": ((torch.float32, torch.bfloat16), 288),
}
# What a compiled module from before these sources lacks.
_NEWEST_OPERATOR = "linear_grad_hidden"


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


def resolve(operation: str, device: str, dtype: torch.dtype) -> str:
    """The name of the backend that `choose` chooses."""
    return choose(operation, device, dtype).backend


# What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, which takes a second.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def load() -> None:
    """Register the reference kernels, the compiled ones beside this file if they load, and the Triton kernels."""
    for operation in OPERATORS:
        module = importlib.import_module(f"e3kernels.reference.{operation}")
        forward, backward = getattr(module, operation), getattr(module, f"{operation}_backward")
        register("reference", operation, forward, backward, devices=None, dtypes=(*FLOATS, torch.float64))
    _load_native()
    _load_triton()


def _why_not_built() -> str:
    report = Path(__file__).with_name("_build.json")  # setup.py wrote it
    if not report.exists():
        return "e3kernels/_ops is not built: this source tree was never installed"
    reason = json.loads(report.read_text(encoding="utf-8"))["_ops"].get("reason", "its file was removed")
    return f"e3kernels/_ops is not built: {reason}"


def native_isa() -> str | None:
    """The instruction set of the compiled kernels: the widest that this machine runs, or the one E3_ISA asks for; None
    where they are not loaded. ValueError if E3_ISA names none that runs here."""
    return None if "native" in unavailable else torch.ops.e3.native_isa()


def _native_products(isa: str) -> Products:
    """The products of few rows with a head of contiguous rows that `isa` has; torch's of others."""
    dtypes, few_rows = _NATIVE_PRODUCTS.get(isa, ((), 0))

    def serves(rows: Tensor, weight: Tensor) -> bool:
        return rows.dtype in dtypes and len(rows) <= few_rows and weight.stride(1) == 1

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        if not serves(hidden, weight):
            return linear_logits(hidden, weight, bias, out)
        torch.ops.e3.linear_logits(hidden, weight, bias, out)
        return out

    def grad_hidden(grad: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        if not serves(grad, weight):
            return linear_grad_hidden(grad, weight, out)
        torch.ops.e3.linear_grad_hidden(grad, weight, out)
        return out

    return Products(logits, grad_hidden)


def _load_native() -> None:
    modules = sorted(Path(__file__).parent.glob("_ops*.so"))
    if not modules:
        unavailable["native"] = _why_not_built()
        return
    try:
        torch.ops.load_library(str(modules[0]))
    except OSError as error:
        unavailable["native"] = f"{modules[0].name} cannot be loaded: {error}"
        return
    if not hasattr(torch.ops.e3, _NEWEST_OPERATOR):
        unavailable["native"] = f"{modules[0].name} was built from other sources than these: install again"
        return
    torch.ops.e3.native_isa()  # refuses an E3_ISA that does not run here before anything is served
    for operation in OPERATORS:
        overload = f"e3::{operation}.native"
        if torch._C._dispatch_has_kernel(overload) and torch._C._dispatch_has_kernel_for_dispatch_key(overload, "CPU"):
            register("native", operation, None, None, devices=("cpu",), dtypes=FLOATS)
    products = _native_products(torch.ops.e3.native_isa())
    for operation, dense in (("linear_entropy_kl", "entropy_kl"), ("linear_topk_kl", "topk_kl")):
        if ("native", dense) in services:
            forward, backward = (getattr(torch.ops.e3, f"{dense}_tile{part}").default for part in ("", "_backward"))
            tile = TileKernel(forward, backward, _NATIVE_TILE_LOGITS, lean=True, products=products)
            problem = importlib.import_module(f"e3kernels.reference.{operation}").problem
            register("native", operation, *kernels(problem, tile), devices=("cpu",), dtypes=FLOATS)


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
