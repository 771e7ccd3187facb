"""One measurement of one provider: time, memory above the inputs, and what the figures are relative to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from e3pruner.profiling.process_memory import peak_above_inputs

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
    # Warm again: a round's result lives until the next one is there, so two buffers are in use; both are mapped here.
    results = call(), call()
    del results
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=2 if once < BUDGET / 10 else 0)
