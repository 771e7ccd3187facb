"""Logits on chip: a tile of the product hidden · weightᵀ that never leaves its program's registers.

It saves the logits' way through memory, 4 bytes per logit each way, and pays for it with a matrix product slower than
the vendor's: worth it for narrow heads and where no gradient is asked for.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3kernels.triton.launch import device_of, warps
from e3kernels.triton.statistics import scaled_logits

TILE_LOGITS = 64 << 20  # logits of one model in a tile: 128 MiB in bf16, enough rows to fill a device's matrix units
# Rows of a tile whose product is added to the fp32 gradient of a weight: per entry of it 8 bytes move, and 2 operations
# are made per row, of which 200 to 300 take as long as a byte.
ADDED_ROWS = 2048
ON_CHIP_WIDTH = 1024  # hidden sizes up to which keeping the logits on chip is expected to pay; see bench/static


class Tiling(NamedTuple):
    """The grid (blocks of tokens, splits of the vocabulary) and the tile of one product."""

    blocks: int
    splits: int
    split_size: int
    bm: int
    bn: int
    bk: int
    warps: dict[str, Any]
    interpreted: bool

    def options(self) -> dict[str, Any]:
        """The launch's keyword arguments."""
        tile = {"BM": self.bm, "BN": self.bn, "BK": self.bk, "UPCAST": self.interpreted}
        return tile | self.warps | {"num_stages": 3}


def tiling(rows: int, vocabulary: int, hidden: Tensor) -> Tiling:
    """Enough splits of the vocabulary for two programs a multiprocessor, at most 32."""
    device = hidden.device
    processors = device_of(device.type, device.index).processors
    bm, bn, bk = (16, 32, 16) if device.type == "cpu" else (64, 128, 64)
    blocks, steps = triton.cdiv(rows, bm), triton.cdiv(vocabulary, bn)
    splits = max(1, min(steps, 32, 2 * processors // max(blocks, 1)))
    size = triton.cdiv(steps, splits) * bn
    return Tiling(blocks, triton.cdiv(vocabulary, size), size, bm, bn, bk, warps(8), device.type == "cpu")


def suits_chip(dtype: torch.dtype, *matrices: Tensor) -> bool:
    """Whether products of these hidden states and weights, computed in `dtype`, are worth keeping on chip. fp32 has no
    matrix unit: its products take three times as long here as the vendor's and the logits' way through memory."""
    return dtype.itemsize == 2 and all(
        matrix.dtype == dtype and matrix.stride(-1) == 1 and 16 <= matrix.shape[1] <= ON_CHIP_WIDTH
        for matrix in matrices
    )


@triton.jit
def _dot(
    hidden_ptr, weight_ptr, acc, rows, columns, k, N, V, H, hidden_stride, weight_stride,
    BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + the product of BK hidden columns from k on; UPCAST because Triton's interpreter has no bf16 products."""
    width = k + tl.arange(0, BK)
    h = tl.load(
        hidden_ptr + rows[:, None] * hidden_stride + width[None, :],
        mask=(rows[:, None] < N) & (width[None, :] < H), other=0.0,
    )  # fmt: skip
    w = tl.load(
        weight_ptr + columns[:, None].to(tl.int64) * weight_stride + width[None, :],
        mask=(columns[:, None] < V) & (width[None, :] < H), other=0.0,
    )  # fmt: skip
    if UPCAST:
        h = h.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(h, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def projected_tile(
    hidden_ptr, weight_ptr, bias_ptr, rows, columns, N, V, H, hidden_stride, weight_stride, transform,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of logits at T = 1, in fp32; −∞ beyond the vocabulary."""
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, H, BK):
        acc = _dot(hidden_ptr, weight_ptr, acc, rows, columns, k, N, V, H, hidden_stride, weight_stride, BK, UPCAST)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    y, _ = scaled_logits(acc, transform)
    return tl.where(columns[None, :] < V, y, float("-inf"))
