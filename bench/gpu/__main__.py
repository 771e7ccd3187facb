"""Measure every operation and the runtime against their peers on this machine's GPU. Never run on one yet.

    python -m bench.gpu [--rehearse]

Rows, each written at once (bench/gpu/rows.py; to bench/results/gpu.jsonl unless E3_ROWS names another file): the median
of the times of triton.testing.do_bench, which clears the L2 cache between runs, peak memory beyond the inputs, and the
percentage of the ceiling: the time that the bytes or the operations take at the rate that a copy and a bf16 product
reached here, over the measured one. A contestant that cannot run has no time and a reason. --rehearse runs each
contestant once, at small sizes, on the CPU.
"""

import argparse
import importlib.metadata
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from bench.gpu import rows
from bench.gpu.contestants import contests
from bench.gpu.decoding import decoding_contest

RESULTS = Path(__file__).parents[1] / "results" / "gpu.jsonl"


def _measure(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    try:
        step()
        if device.type == "cpu":
            return {"ms": None, "why": "a rehearsal: it ran once"}
        accelerator = torch.get_device_module(device.type)
        accelerator.synchronize()
        before = accelerator.memory_allocated()
        accelerator.reset_peak_memory_stats()
        step()
        accelerator.synchronize()
        peak = accelerator.max_memory_allocated() - before
        low, median, high = triton.testing.do_bench(step, warmup=50, rep=300, quantiles=[0.2, 0.5, 0.8])
    except Exception as error:  # a peer's, of whatever kind: a row that says so
        return {"ms": None, "why": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
    return {"ms": median, "ms_20": low, "ms_80": high, "peak_mib": peak / 2**20}


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes a second of a copy (read and written) and multiplications and additions a second of a bf16 product."""
    source = torch.empty(2**30, device=device, dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    copy = _measure(lambda: target.copy_(source), device)["ms"]
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = _measure(lambda: left @ right, device)["ms"]
    return {"bytes": 2 * source.numel() / copy * 1e3, "operations": 2 * 8192**3 / product * 1e3}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    small = parser.parse_args().rehearse
    device = torch.device("cpu") if small else torch.accelerator.current_accelerator()
    if device is None:
        parser.error("torch sees no GPU on this machine")
    if not small and "E3_ROWS" not in os.environ:
        RESULTS.unlink(missing_ok=True)
        os.environ["E3_ROWS"] = str(RESULTS)
    rows.append(
        commit=subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        machine="cpu" if small else torch.get_device_module(device.type).get_device_name(),
        versions={name: _version(name) for name in ("torch", "triton", "transformers", "liger_kernel", "trl")},
    )
    rates = None if small else ceilings(device)
    rows.append(ceilings=rates)
    for name, contest in (contests(device.type, small) | decoding_contest(device, small)).items():
        for contestant, step in contest.prepare().items():
            row = _measure(step, device)
            if rates and row["ms"] and (contest.bytes or contest.operations):
                floor = max(contest.bytes / rates["bytes"], contest.operations / rates["operations"])
                row["percent_of_ceiling"] = 100 * floor / (row["ms"] / 1e3)
            rows.append(contest=name, contestant=contestant, **row)
        if not small:
            torch.get_device_module(device.type).empty_cache()


if __name__ == "__main__":
    main()
