"""Fill a device family's launch file by measuring on the device at hand. Never run yet: no GPU was at hand.

`path = tune(torch.device("cuda"))` is the whole interface; the next launch in the process uses the new file.

For each kernel class and dtype, rows of each vocabulary are timed under every candidate tile; the fastest is recorded
up to that vocabulary, and the last for all longer rows.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from e3kernels.compat import set_wrap_triton_enabled
from e3kernels.triton import entropy_kl
from e3kernels.triton.launch import CONFIGS, Sweep, configured_sweep, device_of, forced, table_of
from e3kernels.triton.sweeps import TERMS

VOCABULARIES = (8192, 32768, 151936)
DTYPES = (torch.bfloat16, torch.float32)


def candidates(warp: int, itemsize: int) -> Iterator[Sweep]:
    """Tiles of one or two 128-bit accesses a lane, 128 to 1024 lanes, 1 to 4 such rounds a step."""
    for lanes, accesses, unroll in itertools.product((128, 256, 512, 1024), (1, 2), (1, 2, 4)):
        yield Sweep(lanes, accesses * 16 // itemsize, unroll, lanes // warp)


def _launches(student: Tensor, teacher: Tensor) -> dict[str, Callable[[], Any]]:
    scalars = torch.tensor([2.0, 1.0, 1.0, 0.5, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    call = entropy_kl.prepared(student, teacher, None, None, scalars, 1, 0, -100)
    one = torch.ones((), device=student.device)
    terms = torch.zeros(len(student), TERMS.value, device=student.device)
    grad = torch.empty_like(student)
    return {
        "statistics": lambda: entropy_kl.partial_statistics(call),
        "gradient": lambda: entropy_kl.logits_gradient(call, terms, one),
        "row": lambda: entropy_kl.rows_at_once(call, one, grad),
    }


def _fastest(kernel: str, launch: Callable[[], Any], tiles: Iterator[Sweep], time: Callable[..., float]) -> Sweep:
    times = {}
    for tile in tiles:
        forced[kernel] = tile
        times[tile] = time(launch)
    del forced[kernel]
    return min(times, key=lambda tile: times[tile])


def measure(device: torch.device, time: Callable[..., float]) -> dict[str, list[dict[str, int | None]]]:
    """The table of `device`: kernel class -> entries as launch.py reads them; `time(f)` is what a call of f costs."""
    _, warp, processors = device_of(device.type, device.index)
    table: dict[str, list[dict[str, int | None]]] = {}
    for dtype, columns in itertools.product(DTYPES, VOCABULARIES):
        student, teacher = (torch.randn(4 * processors, columns, device=device).to(dtype) for _ in range(2))
        for kernel, launch in _launches(student, teacher).items():
            best = _fastest(kernel, launch, candidates(warp, dtype.itemsize), time)
            limit = None if columns == VOCABULARIES[-1] else columns
            tile = {"warps": best.warps, "vec": best.vec, "unroll": best.unroll}
            table.setdefault(kernel, []).append({"columns": limit, "itemsize": dtype.itemsize, **tile})
    return table


def tune(device: torch.device) -> str:
    """Measure on `device`, a CUDA, ROCm or XPU device, and write its family's launch file; returns the file's path.

    ValueError for any other device; nothing is written then.
    """
    if device.type not in ("cuda", "xpu"):
        raise ValueError(f"device is {device}; tiles can be timed on a cuda (ROCm too) or an xpu device")
    with set_wrap_triton_enabled(False):
        table = measure(device, lambda launch: triton.testing.do_bench(launch, return_mode="median"))
    path = CONFIGS / f"{device_of(device.type, device.index).family}.json"
    name = torch.get_device_module(device.type).get_device_name(device)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps({"source": f"measured on {name}", "kernels": table}, indent=2) + "\n")
    partial.replace(path)
    table_of.cache_clear()
    configured_sweep.cache_clear()
    return str(path)
