"""Compile whatever a function launches, for a GPU that is not there.

Triton's own launch path chooses signature, specialisation and options; only its driver is replaced by one that names
the target, and the launch itself is left out. Arguments live on torch's meta device. A launch's fingerprint is a hash
of all that its binary depends on, so that a kernel whose binary has been read before need not be compiled again.
"""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from torch._library.triton import set_wrap_triton_enabled
from triton import knobs
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


class Launch(NamedTuple):
    """A kernel's launch; `binary` is None where its fingerprint was known already."""

    fingerprint: str
    binary: CompiledKernel | None


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


def _source(kernel: JITFunction) -> dict[str, str]:
    """The text of `kernel`, of every function that it calls, and the constants and named tuples that they name."""
    text: dict[str, str] = {}
    pending = [kernel]
    while pending:
        function = pending.pop()
        text[function.__name__] = function.src
        for name in set(re.findall(r"\w+", function.src)) - text.keys():
            value = function.fn.__globals__.get(name)
            if isinstance(value, JITFunction):
                pending.append(value)
            elif isinstance(value, tl.constexpr):
                text[name] = repr(value.value)
            elif fields := getattr(value, "_fields", None):
                text[name] = repr(fields)
    return text


class _Forgetful(dict[Any, Any]):
    """Keeps nothing, so that every launch comes to Triton."""

    def __setitem__(self, key: Any, value: Any) -> None: ...


@contextmanager
def for_target(family: str) -> Iterator[None]:
    """Triton compiles for `family`, and launches are chosen for it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: an interpreted kernel cannot be compiled; unset it")
    target, processors = TARGETS[family]
    device = launch.Device(family, target.warp_size, processors)
    driver.set_active(_Driver(family))
    launch.configured_sweep.cache_clear()
    try:
        described = mock.patch.object(launch, "device_of", return_value=device)
        with described, mock.patch.object(launch, "launched", _Forgetful()), set_wrap_triton_enabled(False):
            yield
    finally:
        driver._active = None
        launch.configured_sweep.cache_clear()


def launches(family: str, call: Callable[[], Any], known: Collection[str] | None) -> dict[str, Launch]:
    """The launches that `call` makes, by kernel, each compiled for `family` unless its fingerprint is `known`; None
    knows them all. `call` allocates on the meta device."""
    found: dict[str, Launch] = {}
    run = JITFunction.run

    def fingerprinted(*, key: str, fn: Any, **_: Any) -> bool:
        kernel = fn.jit_function
        identity = f"{triton.__version__} {family} {key} {sorted(_source(kernel).items())}"
        fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
        found[kernel.__name__] = Launch(fingerprint, None)
        return known is None or fingerprint in known

    def warm(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> CompiledKernel | None:
        self.device_caches.clear()  # so that the hook sees every launch
        binary = run(self, *args, grid=grid, warmup=True, **kwargs)
        found[self.__name__] = found[self.__name__]._replace(binary=binary)
        return binary

    hook = mock.patch.object(knobs.runtime, "jit_cache_hook", fingerprinted)
    with for_target(family), hook, mock.patch.object(JITFunction, "run", warm), torch.device("meta"):
        call()
    return found
