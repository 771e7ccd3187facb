"""Gumbel-TopK sampling of exactly k ones, with a straight-through gradient."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, lru_cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from e3kernels.backends import resolve
from e3kernels.compat import device_keys, inside_transform, is_batched, is_observed
from e3kernels.contract import RELAXATIONS
from e3kernels.ops.common.arguments import FLOAT_DTYPES, check_dtype, check_number, code, scalar_tensor
from e3kernels.registration import Operator, declare, differentiable


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), logits.new_empty(logits.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    logits, scalars, *ctx.codes = inputs
    return logits, outputs[1], scalars


def _make_backward(overload: Any) -> Callable[..., Any]:
    def backward(
        ctx: Any, saved: Sequence[Tensor], grad_mask: Tensor | None, grad_probs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # Straight-through: the mask's gradient is that of probs, so the two incoming gradients add.
        incoming = [gradient for gradient in (grad_mask, grad_probs) if gradient is not None]
        if not incoming:
            return (None,) * 6
        logits, probs, scalars = saved
        total = incoming[0] if len(incoming) == 1 else incoming[0] + incoming[1]
        return overload(total, logits, probs, scalars, *ctx.codes), *(None,) * 5

    return backward


_ARGUMENTS = "Tensor scalars, SymInt k, SymInt seed, SymInt step, int relaxation"

OPERATOR = declare(
    Operator(
        name="gumbel_topk",
        schema=f"(Tensor logits, {_ARGUMENTS}) -> (Tensor mask, Tensor probs)",
        fake=_fake,
        backward_schema=f"(Tensor grad, Tensor logits, Tensor probs, {_ARGUMENTS}) -> Tensor",
        backward_fake=lambda grad, logits, *_: logits.new_empty(logits.shape),
        remember=_remember,
        make_backward=_make_backward,
    )
)


class GumbelTopK(NamedTuple):
    """A sample: `mask` of exactly k ones a row, and its relaxation `probs`; both of the logits' shape and dtype."""

    mask: Tensor
    probs: Tensor


def gumbel_topk(
    logits: Tensor,
    k: int,
    *,
    tau: float = 1.0,
    noise_scale: float = 1.0,
    seed: int = 0,
    step: int = 0,
    relaxation: str = "threshold",
) -> GumbelTopK:
    """Sample k of L by perturbed scores s = θ + κ·g, g = −log(−log u) (Gumbel-top-k, Kool et al., arXiv 1903.06059).

    `mask` has ones at the k largest s (ties: the lower index) and the gradient of `probs` (straight-through):

        threshold    p = σ((s − c)/τ) with c such that Σp = k
        softmax      p = k·softmax(s/τ), which may exceed 1
        successive   the sum of k successive softmaxes (Xie & Ermon, arXiv 1901.10517)

    u comes from Philox4x32-10 with key `seed` and counter (`step`, row, column): the same on every rank, device and
    backend, and independent of the global generator. k = 0 and k = L give a constant mask and a zero gradient.

    Args:
        logits: θ, (..., L), float32, bfloat16, float16 or float64. `theta.expand(B, L)` draws B samples of one θ. A
            logit of +∞ is always kept, −∞ never (as far as k allows); NaN makes its row NaN.
        k: how many to keep, 0 ≤ k ≤ L.
        tau: τ > 0.
        noise_scale: κ ≥ 0; 0 takes the k largest logits.
        seed, step: 0 ≤ value < 2⁶³.

    Raises:
        ValueError, TypeError: an argument's value or dtype is wrong; the message names it.
        RuntimeError: the backend asked for cannot serve.
    """
    check_dtype("logits", logits, FLOAT_DTYPES)
    length = logits.shape[-1] if logits.dim() else 0
    if length == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be (..., L) with L at least 1")
    if logits.dtype.itemsize == 2 and (logits.requires_grad or inside_transform()) and torch.is_grad_enabled():
        # The gradient is made of p·(1 − p): rounded to 16 bits, a p near 1 would leave little of it.
        wide = gumbel_topk(
            logits.float(), k, tau=tau, noise_scale=noise_scale, seed=seed, step=step, relaxation=relaxation
        )
        return GumbelTopK(*(result.to(logits.dtype) for result in wide))
    device = logits.device.type
    backend = resolve("gumbel_topk", device, logits.dtype)
    rows = logits if logits.dim() <= 2 else logits.reshape(-1, logits.shape[-1])
    if _is_plain(logits):
        _check_counter(seed, step)
        scalars, relaxation_code = _checked(length, k, tau, noise_scale, relaxation)
        mask, probs = _direct(backend, device)(rows, scalars, k, seed, step, relaxation_code)
    else:
        if not torch.compiler.is_compiling():
            _check_counter(seed, step)
        _check(length, k, tau, noise_scale)
        codes = (k, seed, step, code("relaxation", relaxation, RELAXATIONS))
        mask, probs = getattr(OPERATOR.packet, backend)(rows, scalar_tensor((tau, noise_scale), logits.device), *codes)
    if rows is logits:
        return GumbelTopK(mask, probs)
    return GumbelTopK(mask.reshape(logits.shape), probs.reshape(logits.shape))


def _check(length: int, k: int, tau: float, noise_scale: float) -> None:
    if not 0 <= k <= length:
        raise ValueError(f"k is {k}; it must be at least 0 and at most L = {length}")
    check_number("tau", tau, 0)
    check_number("noise_scale", noise_scale, 0, open_low=False)


def _check_counter(seed: int, step: int) -> None:
    if not (0 <= seed < 1 << 63 and 0 <= step < 1 << 63):
        name, value = ("step", step) if 0 <= seed < 1 << 63 else ("seed", seed)
        raise ValueError(f"{name} is {value}; it must be at least 0 and less than 2**63")


@lru_cache(maxsize=256)
def _checked(length: int, k: int, tau: float, noise_scale: float, relaxation: str) -> tuple[Tensor, int]:
    """The scalars and the relaxation's code, checked and made once for a search's many samples."""
    _check(length, k, tau, noise_scale)
    # A tensor born in inference mode could not be saved for a later backward.
    with torch.inference_mode(False):
        return scalar_tensor((tau, noise_scale), torch.device("cpu")), code("relaxation", relaxation, RELAXATIONS)


def _is_plain(tensor: Tensor) -> bool:
    """Eager, with no tensor subclass, transform, tangent, mode or profiler that would have to see the operator."""
    return (
        not torch.compiler.is_compiling()
        and not is_observed()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not inside_transform()
        and unpack_dual(tensor).tangent is None
    )


@cache
def _direct(backend: str, device: str) -> Callable[..., tuple[Tensor, ...]]:
    """The kernel with its gradient, called below the dispatcher's Python autograd layer.

    That layer costs several times the kernel, which takes microseconds; the formulas are those registered with it. For
    the compiled kernel all of it is C++, if the module that needs ATen is there.
    """
    if backend == "native":
        with suppress(ImportError):  # `info()` says why
            return import_module("e3kernels._runtime").gumbel_topk  # type: ignore[no-any-return]
    keys = device_keys(device)
    sample = partial(getattr(OPERATOR.packet, backend).redispatch, keys)
    operator = getattr(OPERATOR.backward_packet, backend)
    kernel = partial(operator.redispatch, keys)

    def gradient(incoming: Tensor, *rest: Any) -> Tensor:
        return (operator if is_batched(incoming) else kernel)(incoming, *rest)  # type: ignore[no-any-return]

    return differentiable(OPERATOR, sample, gradient)
