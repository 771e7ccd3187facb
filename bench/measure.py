"""One measurement of one provider: time, memory above the inputs, and what the figures are relative to."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from e3kernels.backends import native_isa

# Seconds of rounds a provider gets, and the bounds on their number.
BUDGET, FEWEST, MOST = 1.0, 3, 200


def measure(
    benchmark: Any, call: Callable[[], object], *, op: str, provider: str, phase: str, dtype: torch.dtype,
    sizes: dict[str, int], work: float, unit: str, errors: tuple[float, float] | None = None, **details: object,
) -> None:  # fmt: skip
    """Time `call` by pytest-benchmark and keep the rest of its row in `extra_info`.

    `work` is what the operation must move ("B") or compute ("FLOP") at least; `unit` says which. The provider named
    `floor` is the physical bound: the rows of one case differ in nothing but the provider.
    """
    call()  # what is made once: compiled code, threads, primitives
    start = time.perf_counter()
    memory = peak_above_inputs(call)
    once = time.perf_counter() - start
    rounds = min(MOST, max(FEWEST, int(BUDGET / max(once, 1e-6))))
    iterations = max(1, int(2e-3 / max(once, 1e-7))) if once < 1e-3 else 1
    benchmark.extra_info.update(
        op=op, provider=provider, phase=phase, dtype=str(dtype).removeprefix("torch."), **sizes, work=work, unit=unit,
        peak_bytes=memory, loss_error=errors and errors[0], grad_error=errors and errors[1], **details,
    )  # fmt: skip
    benchmark.pedantic(call, rounds=rounds, iterations=iterations)


def peak_above_inputs(call: Callable[[], object]) -> int | None:
    """Growth of the process's resident memory at its highest while `call` runs; None where Linux does not tell.

    The memory that the kernels keep for their next result is released first, so that it counts.
    """
    if not Path("/proc/self/clear_refs").exists():
        call()
        return None
    gc.collect()
    if native_isa() is not None:
        torch.ops.e3.release_memory()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


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
