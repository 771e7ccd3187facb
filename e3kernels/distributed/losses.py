"""The losses with the vocabulary in parts: the reference kernels over `ShardedColumns`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from e3kernels.backends import requested
from e3kernels.contract import accumulate_dtype
from e3kernels.distributed.columns import ShardedColumns
from e3kernels.reference.entropy_kl import entropy_kl, entropy_kl_backward
from e3kernels.reference.topk_kl import topk_kl, topk_kl_backward
from e3kernels.registration import Operator, differentiable
from e3kernels.tiled import linear_entropy_kl, linear_topk_kl
from e3kernels.tiled.linear import REFERENCE_LOGITS, LinearLoss, TileKernel, kernels

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# By the operator's name: the kernels of its dense form, and what makes a tiled loss of them.
_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., LinearLoss] | None]] = {
    "entropy_kl": (entropy_kl, entropy_kl_backward, None),
    "topk_kl": (topk_kl, topk_kl_backward, None),
    "linear_entropy_kl": (entropy_kl, entropy_kl_backward, linear_entropy_kl.problem),
    "linear_topk_kl": (topk_kl, topk_kl_backward, linear_topk_kl.problem),
}


def sharded_loss(
    operator: Operator, group: ProcessGroup | None, like: Tensor, width: int
) -> tuple[Callable[..., tuple[Tensor, ...]] | None, int]:
    """What takes the arguments of the dispatcher's `operator` and gives its results, and the columns of the whole
    vocabulary, for a rank of `group` that holds `width` of them for the tokens of `like` (..., D). (None, `width`)
    without a group.

    Raises RuntimeError if a backend was asked for by name that is not the reference, ValueError as `ShardedColumns`.
    """
    if group is None:
        return None, width
    if requested() not in (None, "reference"):
        raise RuntimeError(
            f"backend {requested()!r} cannot serve {operator.name}: only the reference takes a sharded vocabulary"
        )
    columns = ShardedColumns(group, width, like.shape[:-1].numel(), like.device)
    dense, dense_backward, problem = _KERNELS[operator.name]
    forward: Callable[..., Any] = partial(dense, columns=columns)
    backward: Callable[..., Any] = partial(dense_backward, columns=columns)
    if problem is not None:
        # All ranks must cut the same tiles, also where one holds fewer columns: their sums meet tile by tile.
        rows = max(1, REFERENCE_LOGITS // columns.widest)
        forward, backward = kernels(problem, TileKernel(forward, backward, rows * width))
        # Each rank's columns give a part of the gradient of the hidden states, which come behind (loss, stats).
        forward, backward = _summed(forward, 2, columns), _summed(backward, 0, columns)
    return differentiable(operator, forward, backward), columns.size


def _summed(kernel: Callable[..., tuple[Tensor, ...]], position: int, columns: ShardedColumns) -> Callable[..., Any]:
    def call(*arguments: Any) -> tuple[Tensor, ...]:
        results = list(kernel(*arguments))
        part = results[position]
        if part.numel():
            results[position] = columns.total(part.to(accumulate_dtype(part.dtype))).to(part.dtype)
        return tuple(results)

    return call
