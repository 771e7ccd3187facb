"""gated_residual against torch.lerp and the formula in eager PyTorch; floor: its bytes at the speed of a copy."""

import pytest
import torch
from measure import measure

import e3kernels as e3k

SHAPE = (8, 1024, 2048)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("phase", ["value", "gradient"])
@pytest.mark.parametrize("provider", ["floor", "e3", "eager"])
def test_gated_residual(turns, provider, phase, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, branch, incoming = (torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(3))
    gate = torch.tensor(0.3, requires_grad=True)
    tensors = 3 if phase == "value" else 5
    if provider == "floor":
        # As many bytes as the operation moves, a copy reading half of them and writing the other half.
        source = torch.empty(tensors * hidden.numel() // 2, dtype=dtype).fill_(1)
        target = torch.empty_like(source)
        call = lambda: target.copy_(source)  # noqa: E731
    else:
        function = e3k.gated_residual if provider == "e3" else lambda h, f, m: h + m.to(h.dtype) * (f - h)
        if phase == "value":
            with torch.no_grad():
                call = lambda: function(hidden, branch, gate.detach())  # noqa: E731
        else:
            leaves = (hidden.requires_grad_(), branch.requires_grad_(), gate)
            out = function(*leaves)
            call = lambda: torch.autograd.grad(out, leaves, incoming, retain_graph=True)  # noqa: E731
    measure(
        turns, call, op="gated_residual", provider=provider, phase=phase, dtype=dtype,
        sizes={"N": SHAPE[0] * SHAPE[1], "H": SHAPE[2]}, work=tensors * hidden.numel() * hidden.element_size(),
        unit="B",
    )  # fmt: skip
