"""Dispatcher registration: each operator's schema, fake and autograd formula, applied once per backend overload.

`e3::<op>.<backend>` and `e3::<op>_backward.<backend>` are defined in Python whatever language their kernels are in: a
Python backend passes its functions, a compiled one has already registered its kernels for the same names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

LIBRARY = torch.library.Library("e3", "DEF")


@dataclass(frozen=True)
class Operator:
    """One operation and its gradient: schemas without names, fakes, and the autograd formula.

    `make_backward(overload)` returns the autograd formula that calls the given `<op>_backward` overload.
    """

    name: str
    schema: str
    fake: Callable[..., Any]
    backward_schema: str
    backward_fake: Callable[..., Any]
    setup_context: Callable[..., None]
    make_backward: Callable[[Any], Callable[..., Any]]

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
    torch.library.register_autograd(
        f"e3::{name}.{backend}",
        operator.make_backward(getattr(operator.backward_packet, backend)),
        setup_context=operator.setup_context,
        lib=LIBRARY,
    )
