"""Measure every operation against its peers on this machine's GPU -> bench/results/gpu.json. Never run yet.

Median of the times of triton.testing.do_bench (which clears the L2 cache between runs), and peak memory beyond the
inputs. A contestant that cannot run is recorded with its reason.
"""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from bench.gpu.contestants import contests

RESULTS = Path(__file__).parents[1] / "results" / "gpu.json"


def _measure(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    accelerator = torch.get_device_module(device.type)
    try:
        step()
        accelerator.synchronize()
        before = accelerator.memory_allocated()
        accelerator.reset_peak_memory_stats()
        step()
        accelerator.synchronize()
        peak = accelerator.max_memory_allocated() - before
        low, median, high = triton.testing.do_bench(step, warmup=100, rep=1000, quantiles=[0.2, 0.5, 0.8])
    except (RuntimeError, ImportError) as error:
        return {"cannot run": str(error).split("\n")[0]}
    return {"ms": median, "ms_20": low, "ms_80": high, "peak_mib": peak / 2**20}


def main() -> None:
    device = torch.accelerator.current_accelerator()
    if device is None:
        sys.exit("bench.gpu: torch sees no GPU on this machine")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    rows: dict[str, Any] = {}
    for name, prepare in contests(device.type).items():
        for contestant, step in prepare().items():
            rows.setdefault(name, {})[contestant] = _measure(step, device)
            print(name, contestant, rows[name][contestant])
        torch.get_device_module(device.type).empty_cache()
    document = {
        "command": "python -m bench.gpu",
        "commit": commit,
        "machine": torch.get_device_module(device.type).get_device_name(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton", "liger_kernel", "trl")},
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    partial = RESULTS.with_suffix(".tmp")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(RESULTS)


if __name__ == "__main__":
    main()
