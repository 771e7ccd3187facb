"""Compile every kernel variant for every target and record what the binaries say; nothing is run.

python -m bench.static                    all variants and the peers -> bench/results/triton_static.json
python -m bench.static --check NAME ...   compile the named variants (none named: all) and fail on a spill or on more
                                          bytes per element than recorded
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.static.binary import report
from bench.static.capture import TARGETS, compiled
from bench.static.roofline import estimates
from bench.static.variants import ours, peers

RESULTS = Path(__file__).parents[1] / "results" / "triton_static.json"
Rows = dict[str, dict[str, dict[str, Any]]]


def measure(calls: dict[str, Callable[[], Any]], families: list[str]) -> Rows:
    """variant -> kernel -> family -> what the binary says."""
    rows: Rows = {}
    for name, call in calls.items():
        for family in families:
            for kernel, binary in compiled(family, call).items():
                rows.setdefault(name, {}).setdefault(kernel, {})[family] = report(binary).row()
        print(f"{name}: {', '.join(rows.get(name, ()))}", file=sys.stderr)
    return rows


def findings(rows: Rows, recorded: Rows) -> list[str]:
    """Each spill, and each kernel that moves more bytes an element than recorded."""
    found = []
    for name, kernels in rows.items():
        for kernel, families in kernels.items():
            for family, row in families.items():
                where = f"{name} {kernel} {family}"
                if row["spills"]:
                    found.append(f"{where}: {row['spills']} spill instructions or registers")
                before = recorded.get(name, {}).get(kernel, {}).get(family)
                if before is None:
                    found.append(f"{where}: not recorded; run `python -m bench.static`")
                    continue
                moved, allowed = row["bytes_per_element"] or 0, before["bytes_per_element"] or 0
                if moved > allowed:
                    found.append(f"{where}: {moved} bytes an element, recorded {allowed}")
    return found


def _git_commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def _write(rows: Rows, peer_rows: Rows) -> None:
    packages = ("torch", "triton", "liger_kernel", "trl")
    document = {
        "what": "Compiled ahead of time and read; no kernel of this file has run on a GPU.",
        "command": "python -m bench.static",
        "commit": _git_commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "ours": rows,
        "peers": peer_rows,
        "roofline_estimates": estimates(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    partial = RESULTS.with_suffix(".tmp")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="*", metavar="NAME")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    arguments = parser.parse_args()
    families = arguments.target or list(TARGETS)
    calls = ours()
    if arguments.check is None:
        _write(measure(calls, families), measure(peers(), families))
        return
    names = arguments.check or list(calls)
    found = findings(measure({name: calls[name] for name in names}, families), json.loads(RESULTS.read_text())["ours"])
    print("\n".join(found))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
