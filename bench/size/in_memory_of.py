"""Runs a command in so much memory and says what it took: peak of its own memory, bytes read from disk, seconds.

    python bench/size/in_memory_of.py 4GiB e3 search --model FOLDER ...

Own memory (RssAnon) is what the system cannot drop; pages of mapped files come and go below the limit, which is that of
a cgroup (version 1 or 2; it takes the right to make one). Prints one line of JSON at the end.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}


def cgroup(limit: int) -> Path:
    root = Path("/sys/fs/cgroup")
    old = root / "memory"
    group = (old if old.is_dir() else root) / f"e3-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(limit))
    return group


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [pid, *(each for child in children.read_text().split() for each in family(int(child)))]
    except OSError:
        return []


def figure(pid: int, file: str, name: str) -> int:
    try:
        return int(re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{pid}/{file}").read_text(), re.M)[1])
    except (OSError, TypeError):
        return 0


def main() -> int:
    limit, command = sys.argv[1], sys.argv[2:]
    size = int(float(limit[:-3]) * UNITS[limit[-3:]])
    group, began, peak, read = cgroup(size), time.perf_counter(), 0, {}
    try:
        enter = lambda: (group / "cgroup.procs").write_text(str(os.getpid()))  # noqa: E731
        child = subprocess.Popen(command, preexec_fn=enter)
        while child.poll() is None:
            alive = family(child.pid)
            peak = max(peak, sum(figure(pid, "status", "RssAnon") for pid in alive))
            read |= {pid: figure(pid, "io", "read_bytes") for pid in alive}
            time.sleep(0.05)
        result = {"command": command, "limit": limit, "exit": child.returncode}
        result |= {"peak_rss_anon_mib": round(peak / 1024), "read_gib": round(sum(read.values()) / 2**30, 2)}
        print(json.dumps(result | {"seconds": round(time.perf_counter() - began, 1)}))
    finally:
        group.rmdir()
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
