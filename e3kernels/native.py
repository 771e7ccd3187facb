"""What the compiled module `_ops` offers: its kernels, its instruction set, and products of its own."""

import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from e3kernels.compat import has_kernel
from e3kernels.registration import LIBRARY, OPERATORS
from e3kernels.tiled.linear import Products, TileKernel, kernels, linear_grad_hidden, linear_logits

FOLDER = Path(__file__).parent
# Dtypes for which an instruction set has products of its own, and the rows of a tile up to which they are the faster
# ones: torch's pack the head, which pays with more rows where its products run on tiles of their own.
PRODUCTS = {
    "avx512": ((torch.float32,), 288),
    "avx512_bf16": ((torch.float32, torch.bfloat16), 1024),
    "amx": ((torch.float32, torch.bfloat16), 288),
}
# The linear losses by the dense ones that serve a tile of their logits.
LINEAR = {"linear_entropy_kl": "entropy_kl", "linear_topk_kl": "topk_kl"}
# The operators that the module has beside the overloads `native` of the operations: schemas by name.
SCHEMAS = {
    "native_isa": "() -> str",
    "release_memory": "() -> ()",
    "linear_logits": "(Tensor hidden, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()",
    "linear_grad_hidden": "(Tensor grad, Tensor weight, Tensor(a!) out) -> ()",
}
# Logits of student (which its gradient replaces) and teacher in fp32 are 8 bytes per pair: 56 MiB.
_TILE_LOGITS = 7 << 20


class NativeKernel(NamedTuple):
    """An operation and its gradient; None where C++ has registered the kernel."""

    operation: str
    forward: Callable[..., Any] | None
    backward: Callable[..., Any] | None


def load() -> str | None:
    """Load the module. Why it cannot be; None if it is loaded.

    Raises ValueError if E3_ISA names no instruction set that runs here, before anything is served.
    """
    modules = sorted(FOLDER.glob("_ops*.so"))
    if not modules:
        return _why_not_built()
    try:
        torch.ops.load_library(str(modules[0]))
    except OSError as error:
        return f"{modules[0].name} cannot be loaded: {error}"
    schemas = SCHEMAS | _tile_schemas()
    if not all(has_kernel(f"e3::{name}") and not hasattr(torch.ops.e3, name) for name in schemas):
        return f"{modules[0].name} was built from other sources than these: install again"
    for name, schema in schemas.items():
        LIBRARY.define(name + schema)
    isa()
    return None


def _tile_schemas() -> dict[str, str]:
    """`<op>_tile` and `<op>_tile_backward` of the dense losses: their gradient replaces the student's logits."""

    def in_place(schema: str) -> str:
        return re.sub(r"Tensor( student,| grad_student|$)", r"Tensor(a!)\1", schema)

    schemas = {}
    for name in LINEAR.values():
        schemas[f"{name}_tile"] = in_place(OPERATORS[name].schema)
        schemas[f"{name}_tile_backward"] = in_place(OPERATORS[name].backward_schema)
    return schemas


def isa() -> str:
    """The instruction set of the loaded kernels: the widest that this machine runs, or the one E3_ISA asks for."""
    return str(torch.ops.e3.native_isa())


def native_kernels() -> Iterator[NativeKernel]:
    """What the loaded module serves: the dense operations, and on them the linear ones."""
    for operation in OPERATORS:
        if has_kernel(f"e3::{operation}.native"):
            yield NativeKernel(operation, None, None)
    for operation, dense in LINEAR.items():
        if has_kernel(f"e3::{dense}.native"):
            forward, backward = (getattr(torch.ops.e3, f"{dense}_tile{part}").default for part in ("", "_backward"))
            tile = TileKernel(forward, backward, _TILE_LOGITS, lean=True, products=native_products(isa()))
            linear_loss = importlib.import_module(f"e3kernels.tiled.{operation}").linear_loss
            yield NativeKernel(operation, *kernels(linear_loss, tile))


def native_products(name: str) -> Products:
    """The products of few rows with a head of contiguous rows that instruction set `name` has; torch's of others."""
    dtypes, few_rows = PRODUCTS.get(name, ((), 0))

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


def _why_not_built() -> str:
    report = FOLDER / "_build.json"  # setup.py wrote it
    if not report.exists():
        return "e3kernels/_ops is not built: this source tree was never installed"
    reason = json.loads(report.read_text(encoding="utf-8"))["_ops"].get("reason", "its file was removed")
    return f"e3kernels/_ops is not built: {reason}"
