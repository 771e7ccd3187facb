"""What a call costs the host before a GPU has anything to do: Python, dispatcher, autograd and Triton's binder, for a
GPU that is not there. Kernels are compiled for sm_90 and never launched.

    python bench/ops/host_time.py     a table: microseconds, and their ratio to a call of an operator that does nothing

CPU tensors stand for CUDA's. Scalars count as lying on the host, from where a kernel's arguments bring them.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from bench_gumbel_topk import empty_operator
from triton.compiler import CompiledKernel

import e3kernels as e3k
import e3kernels.triton
from bench.static.capture import for_target
from e3kernels import backends
from e3kernels.triton import entropy_kl, gumbel_topk, launch, topk_kl
from e3kernels.triton.scalars import written_on

CALLS, ROUNDS = 200, 15


def without_launch(kernel: Any) -> None:
    """In the place of loading a compiled kernel to a device."""
    kernel.module, kernel.function, kernel._run = 0, 0, lambda *arguments: None


def never_launched(stack: ExitStack, load: Callable[[Any], None] = without_launch) -> None:
    """Inside `stack`: Triton serves CPU tensors as if they were CUDA's, all but the launch."""
    stack.enter_context(for_target("sm_90"))
    stack.enter_context(mock.patch.object(CompiledKernel, "_init_handles", load))
    stack.enter_context(mock.patch.object(CompiledKernel, "__del__", return_value=None))
    stack.enter_context(mock.patch.object(launch, "launched", {}))
    for module in (entropy_kl, topk_kl, gumbel_topk):
        stack.enter_context(mock.patch.object(module, "on_device", written_on))
    e3kernels.triton.load(backends.register, ("cpu",), backends.FLOATS)
    stack.enter_context(e3k.use_backend("triton"))


def steps() -> dict[str, Callable[[], Any]]:
    """A training step's call of each operation, small."""
    rows, vocabulary = 8, 4096
    student = torch.randn(rows, vocabulary, requires_grad=True)
    teacher = torch.randn(rows, vocabulary)
    log_p, ids = teacher.log_softmax(-1).topk(10)
    hidden = torch.randn(2, 4, 64, requires_grad=True)
    gate = torch.ones((), requires_grad=True)
    theta = torch.zeros(32, requires_grad=True)
    return {
        "entropy_kl": lambda: e3k.entropy_kl(student, teacher),
        "entropy_kl, value": lambda: e3k.entropy_kl(student.detach(), teacher),
        "topk_kl": lambda: e3k.topk_kl(student, log_p, ids),
        "gated_residual": lambda: e3k.gated_residual(hidden, hidden, gate),
        "gumbel_topk": lambda: e3k.gumbel_topk(theta, 24, seed=1, step=2),
    }


def microseconds(call: Callable[[], Any]) -> float:
    """The median over rounds of the mean over calls."""
    call()
    means = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        means.append(1e6 * (time.perf_counter() - start) / CALLS)
    return statistics.median(means)


def main() -> None:
    operator, plain = empty_operator(), torch.zeros(4)
    empty = microseconds(lambda: operator(plain))
    print(f"an operator that does nothing: {empty:.2f} us")
    with ExitStack() as stack:
        never_launched(stack)
        for name, call in steps().items():
            cost = microseconds(call)
            print(f"{name:20} {cost:8.1f} us  {cost / empty:6.0f} x")


if __name__ == "__main__":
    main()
