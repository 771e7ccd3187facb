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
    """What a loss operator takes: the student's tensors, which get a gradient, and the teacher's, which get none (`?`
    marks optional ones), and the codes that it has beside those of all losses."""

    name: str
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    codes: tuple[str, ...] = ()

    @property
    def _names(self) -> list[str]:
        return [name.rstrip("?") for name in self.student]

    @property
    def _arguments(self) -> str:
        tensors = (*self.student, *self.teacher, "labels?", "token_mask?")
        typed = [f"Tensor? {name[:-1]}" if name.endswith("?") else f"Tensor {name}" for name in tensors]
        codes = ("int weighting", "int divergence", "int ignore_index", *self.codes)
        return ", ".join([*typed, "Tensor scalars", *codes])

    @property
    def _needs(self) -> str:
        return ", ".join(f"bool need_{name}" for name in self._names)

    @property
    def schema(self) -> str:
        gradients = ", ".join(f"Tensor grad_{name}" for name in self._names)
        return (
            f"({self._arguments}, int reduction, Tensor? num_items, {self._needs})"
            f" -> (Tensor loss, Tensor stats, {gradients})"
        )

    @property
    def backward_schema(self) -> str:
        if len(self.student) == 1:
            return f"(Tensor grad_loss, {self._arguments}) -> Tensor"
        gradients = ", ".join(f"Tensor grad_{name}" for name in self._names)
        return f"(Tensor grad_loss, {self._arguments}, {self._needs}) -> ({gradients})"

    def read(self, arguments: tuple[Any, ...]) -> LossArguments:
        """The operator's arguments by what they are."""
        count, tensors = len(self.student), len(self.student) + len(self.teacher) + 3  # labels, token mask, scalars
        *codes, reduction, num_items = arguments[tensors:-count]
        return LossArguments(arguments[:tensors], tuple(codes), reduction, num_items, arguments[-count:])

    def empty_gradients(self, tensors: Sequence[Any], needs: Sequence[bool]) -> list[Tensor]:
        """For the fakes: the gradients of `tensors`, which begin with the student's; empty where not needed."""
        first, *parameters = tensors[: len(self.student)]
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
        return loss, stats, *signature.empty_gradients(call.tensors, call.needs)

    return fake


def _backward_fake(signature: LossSignature) -> Callable[..., Any]:
    count = len(signature.student)

    def fake(_: Tensor, first: Tensor, *rest: Any) -> Tensor | tuple[Tensor, ...]:
        if count == 1:
            return first.new_empty(first.shape)
        return tuple(signature.empty_gradients((first, *rest), rest[-count:]))

    return fake


def _ask(signature: LossSignature) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Ask the forward pass for the gradients of the inputs that require one."""

    def ask(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        call = signature.read(arguments)
        if call.reduction == NONE:
            return arguments
        students = zip(call.tensors, call.needs, strict=False)  # which come first
        needs = tuple(asked or (tensor is not None and tensor.requires_grad) for tensor, asked in students)
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
    count = len(signature.student)

    def make_backward(overload: Any) -> Callable[..., Any]:
        def backward(
            ctx: Any, saved: Sequence[Tensor | None], grad_loss: Tensor | None, *_: Any
        ) -> tuple[Tensor | None, ...]:
            nothing: tuple[None, ...] = (None,) * ctx.arity
            if grad_loss is None:
                return nothing
            needs = ctx.needs_input_grad[:count]
            if ctx.reduction == NONE:
                arguments = (grad_loss, *saved, *ctx.codes)
                gradients = [overload(*arguments)] if count == 1 else overload(*arguments, *needs)
            else:
                gradients = [
                    _scaled(gradient, grad_loss) if need and gradient is not None else None
                    for gradient, need in zip(saved, needs, strict=True)
                ]
            wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
            return *wanted, *nothing[count:]

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
