"""Compile whatever a function launches, for a GPU that is not there.

Triton's own launch path chooses signature, specialisation and options; only its driver is replaced by one that names
the target, and the launch itself is left out. Arguments live on torch's meta device.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._library.triton import set_wrap_triton_enabled
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from e3kernels.triton import launch

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 108),
    "sm_90": (GPUTarget("cuda", 90, 32), 132),
    "sm_100": (GPUTarget("cuda", 100, 32), 148),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 304),
}


class _Driver:
    """The part of Triton's driver that compiling needs; one device number a target keeps the caches apart."""

    def __init__(self, family: str) -> None:
        self.target = TARGETS[family][0]
        self.number = list(TARGETS).index(family)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _target(family: str) -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: an interpreted kernel cannot be compiled; unset it")
    target, processors = TARGETS[family]
    described = launch.Device(family, target.warp_size, processors)
    driver.set_active(_Driver(family))
    launch.configured_sweep.cache_clear()
    try:
        with mock.patch.object(launch, "device_of", return_value=described), set_wrap_triton_enabled(False):
            yield
    finally:
        driver._active = None
        launch.configured_sweep.cache_clear()


def compiled(family: str, call: Callable[[], Any]) -> dict[str, CompiledKernel]:
    """The kernels that `call` launches, by name, compiled for `family`; `call` allocates on the meta device."""
    kernels: dict[str, CompiledKernel] = {}
    run = JITFunction.run

    def warm(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> CompiledKernel:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels[self.__name__] = kernel
        return kernel

    with _target(family), mock.patch.object(JITFunction, "run", warm), torch.device("meta"):
        call()
    return kernels
