"""A loss with its gradient, as a training step calls it, and how far both are from the truth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gradient_of(loss: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """A call that computes the loss and its gradients, as a training step does: with new leaves' gradients freed."""

    def call() -> object:
        return torch.autograd.grad(loss(), inputs)

    return call


def errors_of(
    loss: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor], student: Tensor
) -> tuple[float, float]:
    """Largest error of the loss and of its gradient against `exact` in fp64, relative to their largest value."""

    def both(function: Callable[[Tensor], Tensor], leaf: Tensor) -> tuple[Tensor, Tensor]:
        leaf = leaf.detach().clone().requires_grad_()
        value = function(leaf)
        return value.detach().double(), torch.autograd.grad(value, leaf)[0].double()

    ours, truth = both(loss, student), both(exact, student.double())
    loss_error, grad_error = (((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, truth, strict=True))
    return loss_error, grad_error
