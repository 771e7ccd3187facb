"""Gumbel-TopK sampling of exactly k ones, with a straight-through gradient."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable

from e3kernels.ops.registration import Operator, declare


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, scalars, *ctx.codes = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, output[1], scalars)


def _make_backward(overload: Any) -> Callable[..., Any]:
    @once_differentiable
    def backward(ctx: Any, grad_mask: Tensor | None, grad_probs: Tensor | None) -> tuple[Tensor | None, ...]:
        # Straight-through: the mask's gradient is that of probs, so the two incoming gradients add.
        incoming = [gradient for gradient in (grad_mask, grad_probs) if gradient is not None]
        if not incoming:
            return (None,) * 6
        logits, probs, scalars = ctx.saved_tensors
        return overload(sum(incoming[1:], incoming[0]), logits, probs, scalars, *ctx.codes), *(None,) * 5

    return backward


_ARGUMENTS = "Tensor scalars, SymInt k, SymInt seed, SymInt step, int relaxation"

OPERATOR = declare(
    Operator(
        name="gumbel_topk",
        schema=f"(Tensor logits, {_ARGUMENTS}) -> (Tensor mask, Tensor probs)",
        fake=_fake,
        backward_schema=f"(Tensor grad, Tensor logits, Tensor probs, {_ARGUMENTS}) -> Tensor",
        backward_fake=lambda grad, logits, *_: logits.new_empty(logits.shape),
        setup_context=_setup_context,
        make_backward=_make_backward,
    )
)
