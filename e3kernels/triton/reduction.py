"""The token losses' sum or mean."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3kernels.compat import wrap_triton
from e3kernels.contract import REDUCTIONS
from e3kernels.triton.launch import launch, warps
from e3kernels.triton.scalars import number_on

NONE = REDUCTIONS.index("none")
MEAN = REDUCTIONS.index("mean")
SUM = REDUCTIONS.index("sum")


@triton.jit
def reduce_tokens(
    loss_ptr, weight_ptr, items_ptr, out_ptr, N, MEAN: tl.constexpr, HAS_ITEMS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[0] = Σ l / d and out[1] = 1/d with d = Σ w, the given number of items, or 1; 0 counts as 1.

    One program, each lane in one order: no atomics, the same bits every time.
    """
    total = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(loss_ptr + row, mask=row < N, other=0.0)
        weights += tl.load(weight_ptr + row, mask=row < N, other=0.0)
    denominator = tl.sum(weights, axis=0)
    if HAS_ITEMS:
        denominator = tl.load(items_ptr).to(tl.float32)
    if not MEAN:
        denominator = 1.0
    denominator = tl.where(denominator == 0.0, 1.0, denominator)
    tl.store(out_ptr, tl.sum(total, axis=0) / denominator)
    tl.store(out_ptr + 1, 1.0 / denominator)


def reduced_loss(losses: Tensor, stats: Tensor, reduction: int, num_items: Tensor | None) -> tuple[Tensor, Tensor]:
    """(loss, 1/denominator), both 0-dim, of the mean or the sum of token losses with weights stats[3]."""
    out = torch.empty(2, dtype=torch.float32, device=losses.device)
    items = None if num_items is None else number_on(num_items, losses.device)
    launch(wrap_triton(reduce_tokens), (1,),
        losses, stats[3], items, out, losses.shape[0],
        MEAN=reduction == MEAN, HAS_ITEMS=items is not None, BLOCK=1024, **warps(8),
    )  # fmt: skip
    return out[0], out[1]


def without_gradients(
    hidden: Tensor, losses: Tensor, stats: Tensor, reduction: int, num_items: Tensor | None
) -> tuple[Tensor, ...]:
    """The results of a linear loss whose gradients of hidden, weight and bias nobody asked for."""
    empty = [hidden.new_empty(0, dtype=kind) for kind in (hidden.dtype, torch.float32, torch.float32)]
    if reduction == NONE:
        return losses, stats, *empty
    return reduced_loss(losses, stats, reduction, num_items)[0], stats, *empty
