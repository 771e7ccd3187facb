"""The losses' scalars as kernels see them: a device vector of float64, so that no change of value compiles anything."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3kernels.triton.launch import launch

TEMPERATURE: tl.constexpr = tl.constexpr(0)
GAMMA: tl.constexpr = tl.constexpr(1)
KD_RATIO: tl.constexpr = tl.constexpr(2)
BETA: tl.constexpr = tl.constexpr(3)
STUDENT_SOFTCAP: tl.constexpr = tl.constexpr(4)
STUDENT_SCALE: tl.constexpr = tl.constexpr(5)
TEACHER_SOFTCAP: tl.constexpr = tl.constexpr(6)
TEACHER_SCALE: tl.constexpr = tl.constexpr(7)


class Transform(NamedTuple):
    """What a model does to its inputs x: cap·tanh(scale·x / cap), or scale·x without a soft cap.

    CAP: 0 no soft cap, 1 a soft cap, 2 decided by softcap > 0 at run time.
    """

    scale: tl.tensor
    softcap: tl.tensor
    CAP: tl.constexpr


class Mixing(NamedTuple):
    """(β, 1 − β) of the mixture of the Jensen-Shannon divergence, each rounded once and neither 0."""

    beta: tl.tensor
    rest: tl.tensor


@triton.jit
def scalar(scalars_ptr, INDEX: tl.constexpr):
    return tl.load(scalars_ptr + INDEX).to(tl.float32)


@triton.jit
def student_transform(scalars_ptr, CAP: tl.constexpr):
    return Transform(scalar(scalars_ptr, STUDENT_SCALE), scalar(scalars_ptr, STUDENT_SOFTCAP), CAP)


@triton.jit
def teacher_transform(scalars_ptr, CAP: tl.constexpr):
    return Transform(scalar(scalars_ptr, TEACHER_SCALE), scalar(scalars_ptr, TEACHER_SOFTCAP), CAP)


@triton.jit
def mixing(scalars_ptr):
    beta = tl.load(scalars_ptr + BETA)
    return Mixing(tl.maximum(beta, 1e-37).to(tl.float32), (1.0 - beta).to(tl.float32))


@triton.jit
def pack_scalars(
    out_ptr, a: tl.float64, b: tl.float64, c: tl.float64, d: tl.float64, e: tl.float64, f: tl.float64, g: tl.float64,
    h: tl.float64,
):  # fmt: skip
    tl.store(out_ptr, a)
    tl.store(out_ptr + 1, b)
    tl.store(out_ptr + 2, c)
    tl.store(out_ptr + 3, d)
    tl.store(out_ptr + 4, e)
    tl.store(out_ptr + 5, f)
    tl.store(out_ptr + 6, g)
    tl.store(out_ptr + 7, h)


def on_device(scalars: Tensor, device: torch.device) -> Tensor:
    """`scalars` on `device`. Eagerly a kernel writes them from its arguments: no synchronisation, and a CUDA graph
    may capture it, which a copy from host memory is not."""
    if scalars.device == device:
        return scalars
    if type(scalars) is not Tensor:
        return scalars.to(device, non_blocking=True)
    return written_on(scalars, device)


def written_on(scalars: Tensor, device: torch.device) -> Tensor:
    """`scalars`, which lie on the host, on `device` by the arguments of a kernel."""
    out = torch.empty(8, dtype=torch.float64, device=device)
    launch(pack_scalars, (1,), out, *scalars.tolist(), *[0.0] * (8 - scalars.numel()))
    return out


def number_on(number: Tensor, device: torch.device) -> Tensor:
    """A 0-dim tensor on `device`; from host memory by a kernel's argument, as `on_device` has it."""
    if number.device == device or type(number) is not Tensor:
        return number.to(device, non_blocking=True)
    return torch.full((), number.item(), dtype=torch.float64, device=device)


def cap_code(scalars: Tensor, index: int) -> int:
    """The CAP of a `Transform`; 2 for a graph that is traced for any value."""
    if type(scalars) is not Tensor or scalars.device.type != "cpu":
        return 2
    return int(scalars[index].item() > 0)
