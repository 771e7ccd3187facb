"""Where and with what a figure was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import e3kernels

PACKAGES = ("accelerate", "numpy", "safetensors")


def describe_environment() -> dict[str, Any]:
    """Commit, machine, versions, backends and time of this process, as JSON values.

    `commit` is that of the source tree the package was imported from, with "+changes" when tracked files differ from
    it, and None outside a git tree. Memory is in GiB, the load average that of the
    last minute.
    """
    kernels = e3kernels.info()
    return {
        "commit": commit(Path(__file__).parent),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": kernels["cpu"]["name"],
            "instructions": kernels["cpu"]["capability"],
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": kernels["cpu"]["threads"],
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "load_average": round(os.getloadavg()[0], 2),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": kernels["versions"] | {name: version(name) for name in PACKAGES},
        "backends": {name: devices["cpu"]["backend"] for name, devices in kernels["operations"].items()},
    }


def commit(folder: Path) -> str | None:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside somebody else's repository: only a tree that tracks this folder counts.
    if not git("ls-files", "--", "."):
        return None
    head = git("rev-parse", "HEAD")
    code = (":(top)", ":(top,exclude)bench/results")  # the figures themselves are no change of what is measured
    return f"{head}+changes" if git("status", "--porcelain", "--untracked-files=no", "--", *code) else head
