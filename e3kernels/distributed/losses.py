"""The losses with the vocabulary in parts: the reference's or Triton's kernels over `ShardedColumns`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor

from e3kernels.backends import requested, resolve
from e3kernels.distributed.columns import ShardedColumns
from e3kernels.registration import Operator, differentiable
from e3kernels.tiled.linear import REFERENCE_LOGITS, TileKernel, kernels

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sharded_loss(
    operator: Operator, group: ProcessGroup | None, like: Tensor, width: int
) -> tuple[Callable[..., tuple[Tensor, ...]] | None, int]:
    """What takes the arguments of the dispatcher's `operator` and gives its results, and the columns of the whole
    vocabulary, for a rank of `group` that holds `width` of them for the tokens of `like` (..., D). (None, `width`)
    without a group.

    Raises RuntimeError if a backend was asked for by name that cannot serve, ValueError as `ShardedColumns`.
    """
    if group is None:
        return None, width
    backend = _serving(operator.name, like)
    columns = ShardedColumns(group, width, like.shape[:-1].numel(), like.device)
    dense = operator.name.removeprefix("linear_")
    module = import_module(f"e3kernels.{backend}.{dense}")
    forward: Callable[..., Any] = partial(getattr(module, dense), columns=columns)
    backward: Callable[..., Any] = partial(getattr(module, f"{dense}_backward"), columns=columns)
    logits, added_rows = REFERENCE_LOGITS, 0
    if backend == "triton":
        triton = import_module("e3kernels.triton")
        forward, backward = triton.eager(forward), triton.eager(backward)
        logits, added_rows = triton.TILE_LOGITS, triton.ADDED_ROWS
    if dense != operator.name:
        # All ranks must cut the same tiles, also where one holds fewer columns: their sums meet tile by tile.
        rows = max(1, logits // columns.widest)
        linear_loss = import_module(f"e3kernels.tiled.{operator.name}").linear_loss
        # Each rank's columns give a part of the gradient of the hidden states.
        tile = TileKernel(forward, backward, rows * width, added_rows=added_rows, share=columns.begin_total)
        forward, backward = kernels(linear_loss, tile)
    return differentiable(operator, forward, backward), columns.size


def _serving(operation: str, like: Tensor) -> str:
    """The backend of a vocabulary in parts: the whole one's, and the reference in the place of the compiled."""
    backend = resolve(operation, like.device.type, like.dtype)
    if backend != "native":
        return backend
    if requested() == backend:
        raise RuntimeError(f"backend 'native' cannot serve {operation}: it does not take a vocabulary in parts")
    return "reference"
