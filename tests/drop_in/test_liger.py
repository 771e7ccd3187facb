"""Liger's losses by its signatures."""

import pytest
import torch
from torch import nn

from e3kernels.drop_in.liger import LigerFusedLinearJSDLoss, LigerKLDIVLoss


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.3, 2.0)])
def test_fused_linear_jsd(beta, weights):
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="pip install --no-deps liger-kernel")
    torch.manual_seed(0)
    labels = torch.randint(40, (9,))
    labels[4] = -100
    teacher = torch.randn(9, 6), torch.randn(40, 6)
    results = []
    for kind in (liger.LigerFusedLinearJSDLoss, LigerFusedLinearJSDLoss):
        loss = kind(*weights, beta=beta, temperature=1.8, compiled=False, return_soft_hard_loss=True)
        torch.manual_seed(1)
        hidden, head, bias = (torch.randn(shape, requires_grad=True) for shape in ((9, 5), (40, 5), (40,)))
        total, *parts = loss(hidden, head, *teacher, labels, bias)
        (3 * total).backward()
        results.append([total.detach(), *(part.detach() for part in parts), hidden.grad, head.grad, bias.grad])
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("log_target", [True, False])
def test_kl_div(reduction, log_target):
    """Liger's is torch.nn.KLDivLoss on its own kernel, which needs a GPU."""
    torch.manual_seed(0)
    target = torch.randn(7, 30).log_softmax(-1)
    target = target if log_target else target.exp()
    results = []
    for kind in (nn.KLDivLoss, LigerKLDIVLoss):
        torch.manual_seed(1)
        logits = torch.randn(7, 30, requires_grad=True)
        value = kind(reduction=reduction, log_target=log_target)(logits.log_softmax(-1), target)
        value.backward()
        results.append([value.detach(), logits.grad])
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=1e-6)


def test_what_is_not_served_is_named():
    with pytest.raises(ValueError, match="reduction is 'none'"):
        LigerKLDIVLoss(reduction="none")
    with pytest.raises(ValueError, match="size_average is True"):
        LigerKLDIVLoss(size_average=True)
    with pytest.raises(ValueError, match="neither may be negative, nor both 0"):
        LigerFusedLinearJSDLoss(0.0, 0.0)
    with pytest.raises(ValueError, match=r"beta is 1\.5"):
        LigerFusedLinearJSDLoss(beta=1.5)
