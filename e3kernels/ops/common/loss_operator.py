"""What the four distillation losses share as operators: schema, fake and autograd formula.

A loss operator returns (loss, stats, one gradient for each differentiable input). For reductions mean and sum the
forward pass has already computed the gradients for an incoming gradient of 1 and saved them; for `none` the inputs are
saved and the backward operator computes the gradients anew, with one incoming gradient per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from e3kernels.compat import graph_is_kept, is_eager
from e3kernels.contract import REDUCTIONS, accumulate_dtype
from e3kernels.registration import Operator, declare

NONE = REDUCTIONS.index("none")


class LossArguments(NamedTuple):
    """The arguments of a loss operator: its tensors and the scalars, its codes, and what is asked of it."""

    tensors: tuple[Tensor | None, ...]
    codes: tuple[Any, ...]
    reduction: int
    num_items: Tensor | None
    needs: tuple[bool, ...]

    def flat(self) -> tuple[Any, ...]:
        return *self.tensors, *self.codes, self.reduction, self.num_items, *self.needs


@dataclass(frozen=True)
class LossSignature:
    """Arguments of a loss operator: its tensors (`?` marks optional ones), which of them get a gradient, its codes."""

    name: str
    tensors: tuple[str, ...]
    differentiable: tuple[str, ...]
    codes: str

    @property
    def positions(self) -> tuple[int, ...]:
        """Index of each differentiable tensor among the arguments."""
        names = [tensor.rstrip("?") for tensor in self.tensors]
        return tuple(names.index(name) for name in self.differentiable)

    def read(self, arguments: tuple[Any, ...]) -> LossArguments:
        """The operator's arguments by what they are."""
        scalars, count = len(self.tensors), len(self.differentiable)
        *codes, reduction, num_items = arguments[scalars + 1 : -count]
        return LossArguments(arguments[: scalars + 1], tuple(codes), reduction, num_items, arguments[-count:])

    @property
    def _arguments(self) -> str:
        tensors = [f"Tensor? {name[:-1]}" if name.endswith("?") else f"Tensor {name}" for name in self.tensors]
        return ", ".join([*tensors, "Tensor scalars", self.codes])

    @property
    def _needs(self) -> str:
        return ", ".join(f"bool need_{name}" for name in self.differentiable)

    @property
    def schema(self) -> str:
        gradients = ", ".join(f"Tensor grad_{name}" for name in self.differentiable)
        return (
            f"({self._arguments}, int reduction, Tensor? num_items, {self._needs})"
            f" -> (Tensor loss, Tensor stats, {gradients})"
        )

    @property
    def backward_schema(self) -> str:
        if len(self.differentiable) == 1:
            return f"(Tensor grad_loss, {self._arguments}) -> Tensor"
        gradients = ", ".join(f"Tensor grad_{name}" for name in self.differentiable)
        return f"(Tensor grad_loss, {self._arguments}, {self._needs}) -> ({gradients})"


def _empty_gradients(signature: LossSignature, tensors: Sequence[Any], needs: Sequence[bool]) -> list[Tensor]:
    first, *parameters = [tensors[position] for position in signature.positions]
    dtype = accumulate_dtype(first.dtype)
    gradients = [first.new_empty(first.shape if needs[0] else 0)]
    for parameter, need in zip(parameters, needs[1:], strict=True):
        gradients.append(first.new_empty(parameter.shape if need else 0, dtype=dtype))
    return gradients


def _fake(signature: LossSignature) -> Callable[..., Any]:
    def fake(first: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        call = signature.read((first, *rest))
        rows, dtype = first.shape[0], accumulate_dtype(first.dtype)
        loss = first.new_empty((rows,) if call.reduction == NONE else (), dtype=dtype)
        stats = first.new_empty((4, rows), dtype=dtype)
        return loss, stats, *_empty_gradients(signature, call.tensors, call.needs)

    return fake


def _backward_fake(signature: LossSignature) -> Callable[..., Any]:
    count = len(signature.differentiable)

    def fake(_: Tensor, first: Tensor, *rest: Any) -> Tensor | tuple[Tensor, ...]:
        if count == 1:
            return first.new_empty(first.shape)
        return tuple(_empty_gradients(signature, (first, *rest), rest[-count:]))

    return fake


def _ask(signature: LossSignature) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Ask the forward pass for the gradients of the inputs that require one."""

    def ask(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        call = signature.read(arguments)
        if call.reduction == NONE:
            return arguments
        inputs = [call.tensors[position] for position in signature.positions]
        wanted = [tensor is not None and tensor.requires_grad for tensor in inputs]
        needs = tuple(asked or want for asked, want in zip(call.needs, wanted, strict=True))
        return call._replace(needs=needs).flat()

    return ask


def _remember(signature: LossSignature) -> Callable[..., tuple[Tensor | None, ...]]:
    def remember(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        _, *not_differentiable = outputs
        _, _, *gradients = outputs
        ctx.mark_non_differentiable(*not_differentiable)
        call = signature.read(inputs)
        ctx.reduction, ctx.codes, ctx.arity = call.reduction, call.codes, len(inputs)
        return call.tensors if call.reduction == NONE else tuple(gradients)

    return remember


def _scaled(gradient: Tensor, incoming: Tensor) -> Tensor:
    """`gradient` · `incoming`, in the gradient's own memory if no later backward pass needs it: whoever gets it may
    change it. An `incoming` on the CPU that is 1 saves the pass over it."""
    if graph_is_kept() or not (is_eager(gradient) and is_eager(incoming)):
        return gradient * incoming
    if incoming.device.type == "cpu" and incoming.item() == 1:
        return gradient
    return gradient.mul_(incoming)


def _make_backward(signature: LossSignature) -> Callable[[Any], Callable[..., Any]]:
    def make_backward(overload: Any) -> Callable[..., Any]:
        def backward(
            ctx: Any, saved: Sequence[Tensor | None], grad_loss: Tensor | None, *_: Any
        ) -> tuple[Tensor | None, ...]:
            result: list[Tensor | None] = [None] * ctx.arity
            if grad_loss is None:
                return tuple(result)
            needs = [ctx.needs_input_grad[position] for position in signature.positions]
            if ctx.reduction == NONE:
                arguments = (grad_loss, *saved, *ctx.codes)
                gradients = [overload(*arguments)] if len(needs) == 1 else overload(*arguments, *needs)
            else:
                gradients = [
                    _scaled(gradient, grad_loss) if need and gradient is not None else None
                    for gradient, need in zip(saved, needs, strict=True)
                ]
            for position, need, gradient in zip(signature.positions, needs, gradients, strict=True):
                result[position] = gradient if need else None
            return tuple(result)

        return backward

    return make_backward


def declare_loss(signature: LossSignature) -> Operator:
    """Declare the operator of `signature`."""
    return declare(
        Operator(
            name=signature.name,
            schema=signature.schema,
            fake=_fake(signature),
            backward_schema=signature.backward_schema,
            backward_fake=_backward_fake(signature),
            remember=_remember(signature),
            make_backward=_make_backward(signature),
            ask=_ask(signature),
        )
    )
