"""What this installation can do, and why not more: `e3kernels.info()` and `python -m e3kernels.info [--json]`."""

import getpass
import importlib
import importlib.metadata
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from e3kernels import backends
from e3kernels.registration import OPERATORS


def info() -> dict[str, Any]:
    """Versions, processor, the backend of each operation with its reason, and the state of the native modules.

    `operations` maps operation -> device type -> {"backend", "reason"} for float32 inputs under the backend asked for
    now; backend is None where none can serve. `build` holds what setup.py noted of each module that it compiled or
    left out, and torch's own build settings. `accelerator` says by which path the layer-skipping runtime decodes there.
    """
    return {
        "versions": {name: _version(name) for name in ("e3kernels", "triton", "transformers")}
        | {"torch": str(torch.__version__), "python": platform.python_version()},
        "cpu": {
            "name": _processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "instruction_sets": _instruction_sets(),
            "native_isa": backends.native_isa(),
            "threads": torch.get_num_threads(),
        },
        "accelerator": _accelerator(),
        "requested_backend": backends.requested(),
        "operations": {name: {device: _choice(name, device) for device in _devices()} for name in OPERATORS},
        "unavailable_backends": dict(backends.unavailable),
        "native_modules": {"_ops": backends.unavailable.get("native", "loaded"), "_runtime": _runtime()},
        "build": _build(),
        "caches": {
            "triton": os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache"),
            "torch.compile": os.environ.get("TORCHINDUCTOR_CACHE_DIR")
            or str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"),
        },
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _instruction_sets() -> list[str]:
    return [name for name, has in torch.cpu.get_capabilities().items() if has is True]


def _accelerator() -> dict[str, Any] | None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    properties = torch.get_device_module(device).get_device_properties()
    facts = {"type": device.type, "name": properties.name, "memory_bytes": properties.total_memory}
    return facts | ({"runtime": _device_path()} if device.type == "cuda" else {})


def _device_path() -> str:
    """How LayerSkipRuntime decodes on the current CUDA device, and why."""
    try:
        return str(importlib.import_module("e3kernels._runtime").device_path())
    except ImportError as error:
        return f"not loaded: {error}"


def _build() -> dict[str, Any]:
    report = Path(__file__).parents[1] / "_build.json"
    modules = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    return modules | {"torch": [line.strip() for line in torch.__config__.show().splitlines()]}


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _choice(operation: str, device: str) -> dict[str, str | None]:
    try:
        return backends.choose(operation, device, torch.float32)._asdict()
    except RuntimeError as error:
        return {"backend": None, "reason": str(error)}


def _runtime() -> str:
    try:
        importlib.import_module("e3kernels._runtime")
    except ImportError as error:
        return str(error)
    return "loaded"
