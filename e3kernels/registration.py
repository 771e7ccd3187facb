"""Dispatcher registration: each operator's schema, fake, autograd formula and vmap rule, applied once per overload.

`e3::<op>.<backend>` and `e3::<op>_backward.<backend>` are defined in Python whatever language their kernels are in: a
Python backend passes its functions, a compiled one has already registered its kernels for the same names.

Operators have first derivatives in reverse mode, under torch.func and torch.vmap too. Forward mode raises, and so does
differentiating a gradient: nothing is silently zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from e3kernels.compat import apply_at_this_level, below_autograd, outer_levels_differentiate

LIBRARY = torch.library.Library("e3", "DEF")


@dataclass(frozen=True)
class Operator:
    """One operation and its gradient: schemas without names, fakes, and the autograd formula.

    `remember(ctx, inputs, outputs)` returns the tensors to save; it may mark outputs and leave values on `ctx`.
    `make_backward(overload)` returns the formula `(ctx, saved, *incoming) -> gradients of all inputs` that calls the
    given `<op>_backward` overload; an incoming gradient is None where nothing depends on the output.
    `ask(arguments)` returns the arguments with the gradients asked for that autograd will want.
    """

    name: str
    schema: str
    fake: Callable[..., Any]
    backward_schema: str
    backward_fake: Callable[..., Any]
    remember: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], tuple[Tensor | None, ...]]
    make_backward: Callable[[Any], Callable[..., tuple[Tensor | None, ...]]]
    ask: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda arguments: arguments

    @property
    def packet(self) -> Any:
        return getattr(torch.ops.e3, self.name)

    @property
    def backward_packet(self) -> Any:
        return getattr(torch.ops.e3, f"{self.name}_backward")


OPERATORS: dict[str, Operator] = {}


def declare(operator: Operator) -> Operator:
    """Add `operator` to the operators that a backend can serve."""
    OPERATORS[operator.name] = operator
    return operator


def _has_tangent(values: Sequence[Any]) -> bool:
    return any(isinstance(value, Tensor) and unpack_dual(value).tangent is not None for value in values)


def _requires_grad(values: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _each_alone(call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """The vmap rule of every operator: one call per element of the batch, the results stacked."""
    results = [
        call(
            *(value if dim is None else value.select(dim, index) for value, dim in zip(arguments, in_dims, strict=True))
        )
        for index in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


class _FirstDerivative(torch.autograd.Function):
    """The first `count` tensors, gradients that were computed from the others: differentiating them raises."""

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name} is once_differentiable: its gradient has no gradient. Second derivatives (create_graph=True "
            "and a second backward, hvp, torch.func.grad twice) need the formula in plain PyTorch operations, see "
            "docs/dispatcher.md"
        )

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(_no_forward_mode(f"the gradient of {ctx.name}"))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], name: str, count: int, *tensors: Tensor | None) -> tuple[Any, Any]:
        return _FirstDerivative.apply(name, count, *tensors), in_dims[2 : 2 + count]


def _no_forward_mode(what: str) -> str:
    return (
        f"{what} has no forward-mode derivative (torch.func.jvp, jacfwd, torch.autograd.forward_ad). Differentiate it "
        "in reverse mode (backward, torch.autograd.grad, torch.func.grad, vjp, jacrev), or use its formula in plain "
        "PyTorch operations, see docs/dispatcher.md"
    )


def differentiable(
    operator: Operator, forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """`forward`, which takes the operator's arguments and gives its results, with the operator's autograd formula over
    `backward`, which takes the arguments of `<op>_backward`. The results come as a tuple, also where there is one."""
    formula = operator.make_backward(backward)

    class Differentiable(torch.autograd.Function):
        """The results, and behind them an empty tensor that is attached to the graph wherever the first of them is, on
        all levels of function transforms: what was saved need not be, and a gradient must depend on what it depends on
        for a second differentiation to raise."""

        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            with outer_levels_differentiate():
                results = _tuple(forward(*arguments))
                return *results, results[0].reshape(-1)[:0].clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            *results, witness = output
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*operator.remember(ctx, inputs, tuple(results)), witness)

        @staticmethod
        def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
            *saved, witness = ctx.saved_tensors
            with torch.no_grad():
                gradients = formula(ctx, saved, *incoming[:-1])
            if torch.is_grad_enabled() or _has_tangent(incoming):
                return _FirstDerivative.apply(operator.name, len(gradients), *gradients, witness, *incoming)  # type: ignore[no-any-return, no-untyped-call]
            return gradients

        @staticmethod
        def jvp(ctx: Any, *_: Any) -> Any:
            raise RuntimeError(_no_forward_mode(operator.name))

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        if _has_tangent(arguments):
            raise RuntimeError(_no_forward_mode(operator.name))
        if _requires_grad(arguments):
            return apply_at_this_level(Differentiable, *operator.ask(arguments))[:-1]  # type: ignore[no-any-return]
        return _tuple(forward(*arguments))

    return call


def _tuple(results: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _not_differentiable(operator: Operator, backward: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """`backward`, which takes the arguments of `<op>_backward`, with results whose differentiation raises."""

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        results = _tuple(backward(*arguments))
        if not _requires_grad(arguments) and not _has_tangent(arguments):
            return results
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        return apply_at_this_level(_FirstDerivative, operator.name, len(results), *results, *tensors)  # type: ignore[no-any-return]

    return call


def _below_autograd(overload: Any) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with below_autograd():
            return overload(*arguments)

    return call


def _as_declared(overload: Any, call: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """`call` with its result as the schema has it, a tuple only where there are several."""
    if len(overload._schema.returns) > 1:
        return call
    return lambda *arguments: call(*arguments)[0]


def define_overload(
    name: str, backend: str, forward: Callable[..., Any] | None, backward: Callable[..., Any] | None
) -> None:
    """Define `e3::<name>.<backend>` and its gradient; None where the kernel is registered from C++."""
    operator = OPERATORS[name]
    parts = (
        (f"{name}.{backend}", operator.schema, operator.fake, forward),
        (f"{name}_backward.{backend}", operator.backward_schema, operator.backward_fake, backward),
    )
    for overload, schema, fake, kernel in parts:
        LIBRARY.define(overload + schema)
        if kernel is not None:
            LIBRARY.impl(overload, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"e3::{overload}", fake, lib=LIBRARY)
    result, gradient = getattr(operator.packet, backend), getattr(operator.backward_packet, backend)
    autograd = (
        differentiable(operator, _below_autograd(result), gradient),
        _not_differentiable(operator, _below_autograd(gradient)),
    )
    for overload, call in zip((result, gradient), autograd, strict=True):
        torch.library.register_vmap(overload.name(), partial(_each_alone, overload), lib=LIBRARY)
        LIBRARY.impl(overload, _as_declared(overload, call), "Autograd")
