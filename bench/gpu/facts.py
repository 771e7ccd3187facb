"""What the machine is and what serves there, as one row: `python -m bench.gpu.facts`."""

import subprocess

import e3kernels as e3k
from bench.gpu import rows


def _said_by(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except OSError:
        return None


def main() -> None:
    info = e3k.info()
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
    rows.append(
        versions=info["versions"],
        accelerator=info["accelerator"],
        native_modules=info["native_modules"],
        operations=info["operations"],
        gpu=_said_by("nvidia-smi", query, "--format=csv,noheader"),
        nvcc=(_said_by("nvcc", "--version") or "").splitlines()[-1:],
        commit=_said_by("git", "rev-parse", "HEAD"),
    )


if __name__ == "__main__":
    main()
