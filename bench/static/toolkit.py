"""What nvcc makes of the runtime's CUDA kernels: registers and spills that ptxas reports for each architecture."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
_KERNEL = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


def cuda_kernels() -> dict[str, dict[str, dict[str, int]]] | None:
    """kernel -> architecture -> registers and spilled bytes, of every csrc/cuda/*.cu; None without nvcc."""
    if shutil.which("nvcc") is None:
        return None
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    targets = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in ARCHITECTURES]
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        command = ["nvcc", "-std=c++20", "-O3", "-Icsrc", "-t2", *targets, "-Xptxas=-v", "-c", source, "-o", os.devnull]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for name, target, stores, loads, registers in _KERNEL.findall(done.stderr):
            row = {"registers": int(registers), "spills": int(stores) + int(loads)}
            rows.setdefault(f"{source.name} {_demangled(name)}", {})[target] = row
    return rows


def _demangled(name: str) -> str:
    return subprocess.run(["c++filt", "-p", name], capture_output=True, text=True, check=True).stdout.strip()
