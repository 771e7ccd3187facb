"""Launch configurations: by kernel and shape from one JSON file per device family, else by a heuristic.

A file `configs/<family>.json` maps a kernel to a list of {"columns", "itemsize", "warps", "vec", "unroll"}; the
first entry of the input's item size with columns ≥ V (null: any V) is taken. `source` says where the figures are from.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction, driver

from e3kernels.compat import is_wrap_triton_enabled

CONFIGS = Path(__file__).parent / "configs"
PROCESSORS = 132  # of an H100: what a traced graph assumes of a device it cannot ask


class Device(NamedTuple):
    """What a launch depends on: the family's name, lanes in a warp (wavefront), and multiprocessors."""

    family: str
    warp: int
    processors: int


class Sweep(NamedTuple):
    """The tile of one program: LANES lanes of VEC columns, UNROLL times per step."""

    lanes: int
    vec: int
    unroll: int
    warps: int

    @property
    def step(self) -> int:
        return self.lanes * self.vec * self.unroll

    def options(self) -> dict[str, Any]:
        """The launch's keyword arguments."""
        return {"LANES": self.lanes, "VEC": self.vec, "UNROLL": self.unroll, **warps(self.warps)}


def warps(count: int) -> dict[str, Any]:
    """`count` warps with fused multiply-adds, which Triton 3.10 no longer has by default. In a traced graph that is for
    the compiler to say: the higher-order operator of a launch has no such option."""
    fusion = {} if is_wrap_triton_enabled() else {"enable_fp_fusion": True}
    return {"num_warps": count, **fusion}


def lanes(count: int, device: torch.device) -> dict[str, Any]:
    """The warps, or the half as many wavefronts of AMD, that hold `count` lanes."""
    return warps(count // device_of(device.type, device.index).warp)


forced: dict[str, Sweep] = {}


launched: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}  # by all that Triton compiles a kernel for


def _specialised(argument: Any) -> Any:
    """What of an argument Triton compiles for, or more."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() > 31
    return type(argument)


def launch(kernel: Any, grid: tuple[Any, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)`, options by name and all others by position. Triton binds and hashes every
    argument of every launch, which takes longer than a small kernel: what it compiled for arguments alike is launched
    straight away."""
    if not isinstance(kernel, JITFunction):  # traced or interpreted
        kernel[grid](*arguments, **options)
        return
    key = (id(kernel), driver.active.get_current_device(), *map(_specialised, arguments), *options.items())
    found = launched.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **options)
        if compiled is not None and torch.version.hip is None:  # AMD's compiler knows the sizes of tensors too
            names = [parameter.name for parameter in kernel.params[len(arguments) :]]
            launched[key] = compiled, tuple(options[name] for name in names)
        return
    compiled, constants = found
    compiled[(*grid, 1, 1)[:3]](*arguments, *constants)


@functools.cache
def device_of(kind: str, index: int | None) -> Device:
    """The device's launch properties; CPU tensors belong to the interpreter."""
    if kind == "cpu":
        return Device("interpreter", 4, 2)
    if kind == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(index or 0)
        if torch.version.hip:
            return Device(properties.gcnArchName.split(":")[0], 64, properties.multi_processor_count)
        return Device(f"sm_{properties.major}{properties.minor}", 32, properties.multi_processor_count)
    if kind == "xpu" and torch.xpu.is_available():
        return Device("xpu", 32, torch.xpu.get_device_properties(index).gpu_subslice_count)
    return Device("generic", 32, PROCESSORS)


@functools.cache
def table_of(family: str) -> dict[str, list[dict[str, Any]]]:
    path = CONFIGS / f"{family}.json"
    return json.loads(path.read_text())["kernels"] if path.exists() else {}


@functools.cache
def configured_sweep(kernel: str, device: torch.device, itemsize: int, columns: int) -> Sweep:
    """The tile that the family's file names, else the heuristic's: 128-bit accesses, at most eight warps, and sixteen
    columns per lane and step, over which its running sums are rescaled once, where that does not cost a wide wavefront
    its registers."""
    family, warp, _ = device_of(device.type, device.index)
    for entry in table_of(family).get(kernel, ()):
        limit = entry["columns"]
        if entry["itemsize"] == itemsize and (limit is None or columns <= limit):
            return Sweep(entry["warps"] * warp, entry["vec"], entry["unroll"], entry["warps"])
    vec, count = 16 // itemsize, 8
    while count > 1 and count * warp * vec >= 2 * columns:
        count //= 2
    return Sweep(count * warp, vec, 16 // vec if count == 8 and warp == 32 else 1, count)


def sweep_of(kernel: str, device: torch.device, itemsize: int, columns: int) -> Sweep:
    """The tile for rows of `columns` items of `itemsize` bytes; `forced` while tuning. A graph is traced for one
    vocabulary and any number of rows."""
    return forced.get(kernel) or configured_sweep(kernel, device, itemsize, int(columns))


def split_of(sweep: Sweep, device: torch.device, rows: int, columns: int) -> tuple[int, int]:
    """(number, size) of a row's parts: one where the rows alone fill the device, at most 32, whole steps each."""
    wanted = 4 * device_of(device.type, device.index).processors
    steps = triton.cdiv(int(columns), sweep.step)
    splits = int(max(1, min(steps, 32, triton.cdiv(wanted, max(rows, 1)))))
    size = triton.cdiv(steps, splits) * sweep.step
    return triton.cdiv(columns, size), size


def joining(splits: int) -> dict[str, Any]:
    """The launch's keyword arguments of a kernel that joins `splits` parts of each of ROWS rows: one part per lane, as
    more would not stay in registers."""
    parts = triton.next_power_of_2(int(splits))
    return {"SPLITS": parts, "ROWS": max(1, 32 // parts), **warps(1)}


def fills_device(rows: Tensor) -> bool:
    """Whether one program per row keeps every multiprocessor busy."""
    return rows.shape[0] >= 2 * device_of(rows.device.type, rows.device.index).processors


def odd(*rows: Tensor) -> bool:
    """Whether the rows of some of these matrices do not all begin at a boundary of 16 bytes. While tracing there is no
    address; torch allocates at such boundaries, and its compiler copies graph inputs that are not at one."""
    for matrix in rows:
        size = matrix.element_size()
        begin = matrix.data_ptr() if type(matrix) is Tensor else matrix.storage_offset() * size
        if begin % 16 or matrix.stride(0) * size % 16:
            return True
    return False


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
