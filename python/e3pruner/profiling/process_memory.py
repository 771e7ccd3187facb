"""The memory of the whole process at its highest, which no allocator's account can miss."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from e3kernels.backends import native_isa

_M_MMAP_THRESHOLD = -3  # of mallopt
_MAPPED, _USUAL = 256 << 10, 32 << 20  # bytes from which on a block gets pages of its own: here, and at glibc's most


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`, of which only the size of the heap is wanted."""

    _fields_ = (("arena", ctypes.c_size_t), ("others", 9 * ctypes.c_size_t))


def peak_above_inputs(call: Callable[[], object]) -> int | None:
    """Growth of the process's resident memory at its highest while `call` runs; None where Linux does not tell.

    The memory that the kernels keep for their next result is released first, so that it counts. What malloc keeps of
    freed blocks does not (glibc only).
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    if native_isa() is not None:
        torch.ops.e3.release_memory()
    with _freed_blocks_returned():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)


@contextmanager
def _freed_blocks_returned() -> Iterator[None]:
    """Inside, every larger block gets pages of its own, which go back when it is freed: the heap has no room for it."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.mallinfo2.restype = ctypes.c_void_p, _Heap
    libc.malloc_trim(0)
    libc.mallopt(_M_MMAP_THRESHOLD, _USUAL)
    sizes = (16 << 20, 4 << 20, 1 << 20, _MAPPED // 2)
    fillers = [ctypes.c_void_p(filler) for size in sizes for filler in _filling(libc, size)]
    libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED)
    try:
        yield
    finally:
        for filler in fillers:
            libc.free(filler)
        libc.mallopt(_M_MMAP_THRESHOLD, _USUAL)


def _filling(libc: ctypes.CDLL, size: int) -> Iterator[int]:
    """Blocks of `size` bytes, never written to, until one no longer fits into a hole of the heap."""
    grown = False
    while not grown:
        before = libc.mallinfo2().arena
        yield libc.malloc(size)
        grown = libc.mallinfo2().arena > before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
