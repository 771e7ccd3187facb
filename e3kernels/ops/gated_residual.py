"""Interpolation between a layer's input and its output by a gate."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from e3kernels.backends import resolve
from e3kernels.ops.common.arguments import FLOAT_DTYPES, check_device, check_dtype, check_shape
from e3kernels.registration import Operator, declare


def _remember(_: Any, inputs: tuple[Tensor, ...], __: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs


def _make_backward(overload: Any) -> Callable[..., Any]:
    def backward(_: Any, saved: Sequence[Tensor], grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, None) if grad is None else overload(grad, *saved)

    return backward


OPERATOR = declare(
    Operator(
        name="gated_residual",
        schema="(Tensor hidden, Tensor branch_out, Tensor gate) -> Tensor",
        fake=lambda hidden, *_: hidden.new_empty(hidden.shape),
        backward_schema="(Tensor grad, Tensor hidden, Tensor branch_out, Tensor gate) -> (Tensor, Tensor, Tensor)",
        backward_fake=lambda _, *inputs: tuple(tensor.new_empty(tensor.shape) for tensor in inputs),
        remember=_remember,
        make_backward=_make_backward,
    )
)


def gated_residual(hidden: Tensor, branch_out: Tensor, gate: Tensor) -> Tensor:
    """out = h + m·(f − h): the layer's input at m = 0, its output at m = 1, to the bit and whatever the other holds.

    Gradients: dh = (1 − m)·g, df = m·g, dm = Σ g·(f − h), summed to the gate's shape in fp32 (fp64 for float64), where
    0·∞ = 0·NaN = 0. The gate is read on its device; the host never waits for it.

    Args:
        hidden, branch_out: h and f, one shape and dtype: float32, bfloat16, float16 or float64.
        gate: m, any of these dtypes, broadcast against `hidden`.

    Raises:
        ValueError, TypeError: shape, device or dtype is wrong; the message names the argument.
    """
    check_dtype("hidden", hidden, FLOAT_DTYPES)
    check_dtype("branch_out", branch_out, (hidden.dtype,))
    check_dtype("gate", gate, FLOAT_DTYPES)
    check_shape("branch_out", branch_out, hidden.shape, "the shape of hidden")
    check_device(hidden.device, branch_out=branch_out, gate=gate)
    sizes = zip(reversed(gate.shape), reversed(hidden.shape), strict=False)
    if gate.dim() > hidden.dim() or any(size not in (1, full) for size, full in sizes):
        raise ValueError(f"gate has shape {tuple(gate.shape)}; it must broadcast to hidden, {tuple(hidden.shape)}")
    backend = resolve("gated_residual", hidden.device.type, hidden.dtype)
    out: Tensor = getattr(OPERATOR.packet, backend)(hidden, branch_out, gate)
    return out
