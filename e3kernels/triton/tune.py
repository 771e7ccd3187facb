"""Find the launch tiles of the kernels that sweep the vocabulary by measuring on the device at hand.

    python -m e3kernels.triton.tune [--out FOLDER]     -> FOLDER/<family>.json, as launch.py reads it from configs/

For each kernel and dtype, rows of each vocabulary are timed under every candidate tile; the fastest is recorded up to
that vocabulary, and that of the longest for all longer rows. Never run on a GPU yet: none was at hand.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from e3kernels.compat import set_wrap_triton_enabled
from e3kernels.triton import entropy_kl, launch, topk_kl
from e3kernels.triton.launch import Sweep, configured_sweep, device_of, forced, table_of
from e3kernels.triton.statistics import JSD

VOCABULARIES = (8192, 32768, 151936)
DTYPES = (torch.bfloat16, torch.float32)
STORED = 10  # ids of a token

Time = Callable[[Callable[[], Any]], float]
Table = dict[str, list[dict[str, int | None]]]


def candidates(warp: int, itemsize: int) -> Iterator[Sweep]:
    """Tiles of one or two 128-bit accesses per lane, 128 to 1024 lanes, 1 to 4 such rounds per step."""
    for lanes, accesses, unroll in itertools.product((128, 256, 512, 1024), (1, 2), (1, 2, 4)):
        yield Sweep(lanes, accesses * 16 // itemsize, unroll, lanes // warp)


def _launches(student: Tensor, teacher: Tensor) -> dict[str, Callable[[], Any]]:
    """What launches each kernel that sweeps the vocabulary, by its name."""
    scalars = torch.tensor([2.0, 1.0, 1.0, 0.5, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    logprobs = torch.full((len(student), STORED), -3.0, device=student.device)
    ids = torch.arange(STORED, device=student.device).expand(len(student), STORED)
    dense = entropy_kl.prepared(student, teacher, None, None, scalars, 1, 0, -100)
    mixed = dense._replace(divergence=JSD.value)
    sparse = topk_kl.prepared(student, logprobs, ids, None, None, scalars[:6], 1, 0, -100, 0)
    parts, rest = entropy_kl.partial_statistics(dense), topk_kl.partial_statistics(sparse)
    terms = entropy_kl.token_statistics(dense, parts, None, student.shape[1]).terms
    tokens = topk_kl.token_statistics(sparse, rest, None, student.shape[1])
    one, grad = torch.ones((), device=student.device), torch.empty_like(student)
    return {
        "entropy_kl_statistics": lambda: entropy_kl.partial_statistics(dense),
        "entropy_kl_mixture": lambda: entropy_kl.mixture_sums(mixed, parts),
        "entropy_kl_gradient": lambda: entropy_kl.logits_gradient(dense, terms, one),
        "entropy_kl_row": lambda: entropy_kl.rows_at_once(dense, one, grad),
        "topk_kl_statistics": lambda: topk_kl.partial_statistics(sparse),
        "topk_kl_gradient": lambda: topk_kl.logits_gradient(sparse, tokens, one),
    }


def _fastest(kernel: str, call: Callable[[], Any], tiles: Iterator[Sweep], time: Time) -> Sweep:
    """The tile under which `call` costs least; one that does not fit the device is passed over."""
    times = {}
    try:
        for tile in tiles:
            forced[kernel] = tile
            try:
                times[tile] = time(call)
            except triton.OutOfResources:
                continue
    finally:
        forced.pop(kernel, None)
    if not times:
        raise RuntimeError(f"no candidate tile of {kernel} fits this device")
    return min(times, key=lambda tile: times[tile])


def measure(device: torch.device, time: Time) -> Table:
    """The table of `device`: kernel -> entries as launch.py reads them; `time(f)` is what a call of f costs.

    Raises RuntimeError if no tile of a kernel fits the device.
    """
    _, warp, processors = device_of(device.type, device.index)
    table: Table = {}
    for dtype, columns in itertools.product(DTYPES, VOCABULARIES):
        student, teacher = (torch.randn(4 * processors, columns, device=device).to(dtype) for _ in range(2))
        for kernel, call in _launches(student, teacher).items():
            best = _fastest(kernel, call, candidates(warp, dtype.itemsize), time)
            limit = None if columns == VOCABULARIES[-1] else columns
            tile = {"warps": best.warps, "vec": best.vec, "unroll": best.unroll}
            table.setdefault(kernel, []).append({"columns": limit, "itemsize": dtype.itemsize, **tile})
    return table


def record(table: Table, device: torch.device, source: str, folder: Path) -> Path:
    """Write `table` as the launch file of the family of `device` in `folder`; its path. The next launch of this process
    reads the file if it lies where launch.py looks."""
    path = folder / f"{device_of(device.type, device.index).family}.json"
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps({"source": source, "kernels": table}, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    table_of.cache_clear()
    configured_sweep.cache_clear()
    return path


def tune(device: torch.device, folder: Path = launch.CONFIGS) -> Path:
    """Measure on `device`, a CUDA, ROCm or XPU device, and write its family's launch file in `folder`; its path.

    Raises ValueError for any other device, RuntimeError as `measure`; nothing is written then.
    """
    if device.type not in ("cuda", "xpu"):
        raise ValueError(f"device is {device}; tiles can be timed on a cuda (ROCm too) or an xpu device")
    with set_wrap_triton_enabled(False):
        table = measure(device, lambda call: triton.testing.do_bench(call, return_mode="median"))
    name = torch.get_device_module(device.type).get_device_name(device)
    return record(table, device, f"measured on {name}", folder)


def main() -> None:
    """Tune the kernels for the accelerator of this machine."""
    parser = argparse.ArgumentParser(prog="python -m e3kernels.triton.tune", description=main.__doc__)
    parser.add_argument(
        "--out", type=Path, default=launch.CONFIGS, help="folder of the launch file; default: the package's"
    )
    folder = parser.parse_args().out
    if not folder.is_dir():
        parser.error(f"--out {folder} is no folder")
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        parser.error("no CUDA, ROCm or XPU device is here")
    print(tune(device, folder))


if __name__ == "__main__":
    main()
