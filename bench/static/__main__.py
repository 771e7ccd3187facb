"""Compile every kernel variant for every target and record what the binaries say; nothing is run.

python -m bench.static            all variants, the peers, the runtime's CUDA kernels -> bench/results/static.{json,md};
                                  binaries that are recorded already are not compiled again, and without nvcc the
                                  runtime's stay as they are
python -m bench.static --check    compile the launches whose kernel or arguments are not those recorded, and fail on a
                                  spill, or on more bytes per element or narrower accesses than recorded
python -m bench.static --check NAME ...    of the named variants only
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from bench.static.capture import TARGETS
from bench.static.measure import check, measure, own_pairs
from bench.static.roofline import estimates
from bench.static.table import markdown
from bench.static.toolkit import cuda_kernels
from bench.static.variants import peers

RESULTS = Path(__file__).parents[1] / "results" / "static.json"


def _git_commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def record() -> None:
    """Compile everything and write the results."""
    packages = ("torch", "triton", "liger_kernel", "trl")
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"ours": {}, "peers": {}}
    ours = measure(own_pairs(), before["ours"])
    sweeps = [
        ours["entropy_kl/bf16/forward"][f"entropy_kl_{kernel}"]["sm_90"]["instructions_per_element"]
        for kernel in ("statistics", "gradient")
    ]
    document = {
        "what": "Compiled ahead of time and read; no kernel of this file has run on a GPU.",
        "command": "python -m bench.static",
        "commit": _git_commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "ours": ours,
        "peers": measure(((name, family) for family in TARGETS for name in peers()), before["peers"]),
        "cuda": cuda_kernels() or before.get("cuda"),
        "roofline_estimates": estimates(*sweeps),
    }
    text = json.dumps(document, indent=1, ensure_ascii=False)
    text = re.sub(
        r'\{\s*"registers"[^{}]*(\{[^{}]*\}[^{}]*)?\}', lambda row: " ".join(row[0].split()), text
    )  # a row a line
    RESULTS.parent.mkdir(exist_ok=True)
    _replace(RESULTS, text + "\n")
    _replace(RESULTS.with_suffix(".md"), markdown(document))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="*", metavar="NAME")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="with --check; default: all")
    arguments = parser.parse_args()
    if arguments.check is None:
        record()
        return
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))["ours"]
    found = check(arguments.check, arguments.target or list(TARGETS), recorded)
    print("\n".join(found))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
