"""Cutting a checkpoint as files beside `cp` of what stays: seconds of each, bytes, and the peak of anonymous memory.

    python bench/surgery/copying.py --folder FOLDER --drop 8 --out bench/results/surgery.json

They take turns, `rounds` times, and the record has the medians. The copying is timed apart from the checks before it
and the proof after it; `cp` copies what was cut.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from e3pruner import prune
from e3pruner.models.files.empty import read_config
from e3pruner.surgery import checkpoint


def anonymous() -> int:
    """Bytes of memory of this process that no file backs."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Gives a list that holds the largest `anonymous` of the block when it has ended."""
    peak, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--drop", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    layers = read_config(arguments.folder).get_text_config(decoder=True).num_hidden_layers
    kept = [layer for layer in range(layers) if not 0 <= layer - layers // 3 < arguments.drop]

    copied: list[float] = []
    whole = checkpoint.write_shards

    def timed(*args: object, **options: object) -> dict[str, str]:
        began = time.perf_counter()
        digests = whole(*args, **options)  # type: ignore[arg-type]
        copied.append(time.perf_counter() - began)
        return digests

    checkpoint.write_shards = timed  # type: ignore[assignment]
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder.parent) as work:
        for number in range(arguments.rounds):
            cut, copy = Path(work) / f"cut {number}", Path(work) / f"copy {number}"
            began = time.perf_counter()
            with peak_memory() as peak:
                prune(arguments.folder, kept, out=cut)
            total = time.perf_counter() - began
            began = time.perf_counter()
            shutil.copytree(cut, copy)
            rows.append((copied[-1], total - copied[-1], time.perf_counter() - began, peak[0]))
            size = sum(file.stat().st_size for file in cut.iterdir())
            shutil.rmtree(cut)
            shutil.rmtree(copy)
    copy_s, rest_s, cp_s, _ = (statistics.median(column) for column in zip(*rows, strict=True))
    found = {"bytes": size, "kept": len(kept), "layers": layers, "cut_s": copy_s, "checks_and_proof_s": rest_s}
    found |= {"copy_s": cp_s, "peak_anonymous_bytes": max(row[3] for row in rows), "rounds": arguments.rounds}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
