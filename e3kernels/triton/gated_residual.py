"""gated_residual as Triton kernels: out = h + m·(f − h), dh = (1−m)·g, df = m·g, dm = Σ g·(f − h), 0·∞ = 0·NaN = 0.

A gate that is constant on runs of the flattened tensors is read once per program; any other is expanded and read beside
them. m stays on the device. dm is summed in two stages: a number per program, then the programs of each gate in order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3kernels.compat import wrap_triton
from e3kernels.triton.launch import lanes, launch

LANES = 256
BLOCK = 8 * LANES


@triton.jit
def _locate(run_size, BLOCK: tl.constexpr):
    """(run, offsets, mask) of this program's block within its run of `run_size` elements."""
    blocks = tl.cdiv(run_size, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    run = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return run, run * run_size + columns, columns < run_size


@triton.jit
def gated_residual_forward(
    hidden_ptr, branch_ptr, gate_ptr, out_ptr, run_size, gates, FULL: tl.constexpr, BLOCK: tl.constexpr
):
    run, offsets, mask = _locate(run_size, BLOCK)
    h = tl.load(hidden_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    f = tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if FULL:
        m = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        m = tl.load(gate_ptr + run % gates).to(tl.float32)
    out = tl.where(tl.abs(m) < 0.5, h + m * (f - h), f - (1.0 - m) * (f - h))  # from the nearer end
    out = tl.where(m == 0.0, h, tl.where(m == 1.0, f, out))
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weighted(coefficient, value):
    return tl.where(coefficient == 0.0, 0.0, coefficient * value)


@triton.jit
def gated_residual_gradient(
    grad_ptr, hidden_ptr, branch_ptr, gate_ptr, grad_hidden_ptr, grad_branch_ptr, grad_gate_ptr, run_size, gates,
    FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run, offsets, mask = _locate(run_size, BLOCK)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(hidden_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    f = tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dm = _weighted(g, f - h)
    if FULL:
        m = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_gate_ptr + offsets, dm, mask=mask)
    else:
        m = tl.load(gate_ptr + run % gates).to(tl.float32)
        tl.store(grad_gate_ptr + tl.program_id(0), tl.sum(dm, axis=0))
    tl.store(grad_hidden_ptr + offsets, _weighted(1.0 - m, g).to(grad_hidden_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_branch_ptr + offsets, _weighted(m, g).to(grad_branch_ptr.dtype.element_ty), mask=mask)


def _runs(shape: torch.Size, gate_shape: torch.Size) -> tuple[int, int] | None:
    """(gates, run size) if the gate is constant on runs of the flattened tensor and its values repeat in order."""
    aligned = (1,) * (len(shape) - len(gate_shape)) + tuple(gate_shape)
    varies = [gate > 1 for size, gate in zip(shape, aligned, strict=True) if size > 1]
    if True not in varies:
        return 1, math.prod(shape)
    first, last = varies.index(True), len(varies) - varies[::-1].index(True)
    if not all(varies[first:last]):
        return None
    return math.prod(aligned), math.prod([size for size in shape if size > 1][last:])


def _arranged(hidden: Tensor, gate: Tensor) -> tuple[Tensor, int, int, bool]:
    """(gate, gates, run size, FULL) for the kernels."""
    runs = _runs(hidden.shape, gate.shape) if gate.numel() < hidden.numel() else None
    if runs is None or (runs[0] > 1 and runs[1] < BLOCK // 8):
        return gate.expand(hidden.shape).contiguous(), 1, hidden.numel(), True
    return gate.contiguous(), *runs, False


def gated_residual(hidden: Tensor, branch_out: Tensor, gate: Tensor) -> Tensor:
    """The operator's kernel."""
    values, gates, size, full = _arranged(hidden, gate)
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    grid = (hidden.numel() // max(size, 1) * triton.cdiv(size, BLOCK),)
    if hidden.numel():
        launch(wrap_triton(gated_residual_forward), grid,
            hidden.contiguous(), branch_out.contiguous(), values, out, size, gates,
            FULL=full, BLOCK=BLOCK, **lanes(LANES, hidden.device),
        )  # fmt: skip
    return out


def gated_residual_backward(
    grad: Tensor, hidden: Tensor, branch_out: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, df, dm), dm summed to the gate's shape."""
    values, gates, size, full = _arranged(hidden, gate)
    grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    grad_branch = torch.empty(hidden.shape, dtype=branch_out.dtype, device=hidden.device)
    runs, blocks = hidden.numel() // max(size, 1), triton.cdiv(size, BLOCK)
    sums = torch.empty(hidden.shape if full else (runs // gates, gates, blocks), device=hidden.device)
    if hidden.numel():
        launch(wrap_triton(gated_residual_gradient), (runs * blocks,),
            grad.contiguous(), hidden.contiguous(), branch_out.contiguous(), values, grad_hidden, grad_branch, sums,
            size, gates, FULL=full, BLOCK=BLOCK, **lanes(LANES, hidden.device),
        )  # fmt: skip
    grad_gate = sums.sum_to_size(gate.shape) if full else sums.sum((0, 2)).reshape(gate.shape)
    return grad_hidden, grad_branch, grad_gate.to(gate.dtype)
