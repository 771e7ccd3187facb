"""What named ranges cost while nobody measures: a range, an operator's look at the profiler, a recovery step.

    python bench/profiling/bench_ranges.py [--out FILE.json]

The recovery step is one of SmolLM2-135M-Instruct, 30 to 22 layers, 4 x 256 tokens; its ranges are counted by recording
one step and priced at what an unrecorded range costs.
"""

from __future__ import annotations

import argparse
import timeit
from pathlib import Path

import torch
from torch.profiler import record_function

from e3kernels.profiling import RangeRecorder, named_range
from e3pruner import distill, prune
from e3pruner.models import load_smollm2
from e3pruner.profiling.model.profile import middle
from e3pruner.profiling.step.profile import STEP
from e3pruner.report import describe_environment
from e3pruner.storage import write_json

LOOPS = 200_000


def nanoseconds(statement: str, setup: str = "pass", loops: int = LOOPS) -> float:
    """The best of seven: what the statement costs when nothing disturbs it, less an empty loop."""
    names = {"named_range": named_range, "record_function": record_function, "torch": torch}
    best = min(timeit.repeat(statement, setup, globals=names, number=loops, repeat=7))
    empty = min(timeit.repeat("pass", globals=names, number=loops, repeat=7))
    return (best - empty) / loops * 1e9


def recovery_step() -> tuple[int, float]:
    """Ranges of a recovery step, and the seconds it takes."""
    model, _ = load_smollm2(torch.float32)
    student = prune(model, [layer for layer in range(30) if layer not in middle(30, 8)])
    data = torch.randint(49_152, (12, 256), generator=torch.Generator().manual_seed(0))
    with RangeRecorder() as recorder:
        distill(student, teacher=model, data=data, steps=3, batch_size=4)
    last = max((r for r in recorder.ranges if r.name == STEP), key=lambda r: r.start)
    return sum(last.start <= r.start <= last.end for r in recorder.ranges), last.end - last.start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cost = nanoseconds("with named_range('a'): pass")
    ranges, seconds = recovery_step()
    results = {
        "named_range_ns": cost,
        "record_function_ns": nanoseconds("with record_function('a'): pass", loops=20_000),
        "operator_ns": nanoseconds("torch.autograd._profiler_enabled()"),
        "ranges_of_a_recovery_step": ranges,
        "recovery_step_seconds": seconds,
        "share_of_a_recovery_step": ranges * cost * 1e-9 / seconds,
        "command": "python bench/profiling/bench_ranges.py",
        "environment": describe_environment(),
    }
    print({name: value for name, value in results.items() if name != "environment"})
    if options.out is not None:
        write_json(options.out, results)


if __name__ == "__main__":
    main()
