"""Interpolation between a layer's input and its output by a gate."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable

from e3kernels.ops.registration import Operator, declare


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _make_backward(overload: Any) -> Callable[..., Any]:
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return overload(grad, *ctx.saved_tensors)

    return backward


OPERATOR = declare(
    Operator(
        name="gated_residual",
        schema="(Tensor hidden, Tensor branch_out, Tensor gate) -> Tensor",
        fake=lambda hidden, *_: hidden.new_empty(hidden.shape),
        backward_schema="(Tensor grad, Tensor hidden, Tensor branch_out, Tensor gate) -> (Tensor, Tensor, Tensor)",
        backward_fake=lambda _, *inputs: tuple(tensor.new_empty(tensor.shape) for tensor in inputs),
        setup_context=_setup_context,
        make_backward=_make_backward,
    )
)
