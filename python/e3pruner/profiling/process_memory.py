"""The memory of the whole process at its highest, which no allocator's account can miss."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from e3kernels.backends import native_isa

_M_MMAP_THRESHOLD = -3  # of mallopt
_PAGES, _USUAL = 256 << 10, 32 << 20


def peak_above_inputs(call: Callable[[], object]) -> int | None:
    """Growth of the process's resident memory at its highest while `call` runs; None where Linux does not tell.

    The memory that the kernels keep for their next result is released first, so that it counts. Meanwhile malloc gives
    back at once what is freed of the larger blocks that it takes (glibc only): what it keeps is not what is held.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    if native_isa() is not None:
        torch.ops.e3.release_memory()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(_M_MMAP_THRESHOLD, _PAGES)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _USUAL)  # the largest that glibc's own rule reaches


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
