"""Reference `gated_residual`: out = h + m·(f − h); dh = (1 − m)g, df = m·g, dm = Σg·(f − h), 0·∞ = 0·NaN = 0."""

import torch
from torch import Tensor

from e3kernels.contract import accumulate_dtype
from e3kernels.reference.divergence import weighted


def gated_residual(hidden: Tensor, branch_out: Tensor, gate: Tensor) -> Tensor:
    """Kernel of `e3::gated_residual.reference`; m = 0 gives h and m = 1 gives f, whatever the other is."""
    dtype = accumulate_dtype(hidden.dtype)
    h, f, m = hidden.to(dtype), branch_out.to(dtype), gate.to(dtype)
    delta = f - h
    out = torch.where(m.abs() < 0.5, h + m * delta, f - (1 - m) * delta)  # from the nearer end
    out = torch.where(m == 0, h, torch.where(m == 1, f, out))
    return out.to(hidden.dtype).contiguous()


def gated_residual_backward(
    grad: Tensor, hidden: Tensor, branch_out: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of `e3::gated_residual_backward.reference`; dm is summed to the gate's shape."""
    dtype = accumulate_dtype(hidden.dtype)
    g, m = grad.to(dtype), gate.to(dtype)
    grad_gate = weighted(g, branch_out.to(dtype) - hidden.to(dtype)).sum_to_size(gate.shape)
    return (
        weighted(1 - m, g).to(hidden.dtype).contiguous(),
        weighted(m, g).to(branch_out.dtype).contiguous(),
        grad_gate.to(gate.dtype).contiguous(),
    )
