"""A machine with a GPU and no network: build in place, check everything against fp64, then measure.

    python -m bench.gpu.offline [--out FOLDER] [--rehearse] [--only STAGE,...]

Every stage is a process with a time limit, and all of them together have SECONDS; each row lies in FOLDER/rows.jsonl as
soon as it is known, with the end of what a stage prints at its end. A tool or peer that is not there is a row that says
so. --rehearse does the same without a GPU as far as that goes: the kernels in Triton's interpreter, the runtime on
the CPU, small sizes.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from bench.gpu import rows

ROOT = Path(__file__).parents[2]
SECONDS = 470
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.rows", "-p", "no:cacheprovider")


class Stage(NamedTuple):
    """What is run, and for how many seconds at most."""

    name: str
    command: tuple[str, ...]
    seconds: int


def stages(workers: int, rehearse: bool) -> list[Stage]:
    """In the order of their worth: what is wrong comes before how fast it is."""
    parallel = ("-n", str(workers)) if workers > 1 else ()
    small = ("--rehearse",) if rehearse else ()
    quick = "triton and contiguous and (plain or threshold or row) and not float16" if rehearse else "triton"
    kernel = (sys.executable, "-m", "bench.gpu.one_step")
    metrics = "dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed"
    return [
        Stage("build", (sys.executable, "-m", "bench.gpu.build"), 600 if rehearse else 150),
        Stage("facts", (sys.executable, "-m", "bench.gpu.facts"), 60),
        Stage("runtime", (*PYTEST, "-m", "gpu", "tests/runtime/test_gpu_runtime.py"), 120),
        Stage("operations", (*PYTEST, *parallel, "tests/ops/test_parity.py", "-k", quick), 150),
        Stage("whole calls", (*PYTEST, "-m", "gpu", "tests/ops/test_gpu.py", "tests/distributed/test_gpu_fsdp.py"), 90),
        Stage("figures", (sys.executable, "-m", "bench.gpu", *small), 150),
        Stage("sanitizer", ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", *kernel), 60),
        Stage("ncu", ("ncu", "--clock-control", "none", "--metrics", metrics, "--launch-count", "40", *kernel), 60),
    ]


def run(stage: Stage, seconds: float, environment: dict[str, str]) -> None:
    """One stage; its end is a row whatever it is, with the end of what it printed."""
    began = time.monotonic()
    if shutil.which(stage.command[0]) is None:
        rows.append(stage=stage.name, ended="not there", why=f"{stage.command[0]} is not on the path")
        return
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment | {"E3_STAGE": stage.name}, stdout=said, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            ended: object = process.wait(min(seconds, stage.seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            ended = "cut off"
        said.seek(0)
        last = said.read()[-6000:].decode(errors="replace")
    rows.append(stage=stage.name, ended=ended, seconds=round(time.monotonic() - began, 1), said=last)


def summary(path: Path) -> str:
    """A line a stage: how it ended, its outcomes, and what failed."""
    lines = []
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for stage in dict.fromkeys(row["stage"] for row in found):
        of_stage = [row for row in found if row["stage"] == stage]
        outcomes = Counter(row["outcome"] for row in of_stage if "outcome" in row)
        end = next((row for row in of_stage if "ended" in row), {})
        lines.append(f"{stage}: {end.get('ended')} after {end.get('seconds')} s {dict(outcomes) or ''}")
        lines += [f"  {row['test']}: {str(row['why'])[-160:]}" for row in of_stage if row.get("outcome") == "failed"][
            :5
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench/results/gpu-offline")))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--only", default="", help="names of stages, with commas between them")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    target = (options.out / "rows.jsonl").resolve()
    target.unlink(missing_ok=True)
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "E3_ROWS": str(target), "HF_HUB_OFFLINE": "1"}
    environment |= (
        {"E3_TEST_DEVICE": "cpu", "TRITON_INTERPRET": "1"} if options.rehearse else {"E3_TEST_DEVICE": "cuda"}
    )
    os.environ["E3_ROWS"] = str(target)
    wanted = options.only.split(",") if options.only else None
    workers = 1 if options.rehearse else min(8, os.cpu_count() or 1) if importlib.util.find_spec("xdist") else 1
    began = time.monotonic()
    for stage in stages(workers, options.rehearse):
        left = (3600 if options.rehearse else SECONDS) - (time.monotonic() - began)
        if wanted is not None and stage.name not in wanted:
            continue
        if left < 10:
            rows.append(stage=stage.name, ended="not begun", why="no time was left")
            continue
        run(stage, left, environment)
    print(summary(target))


if __name__ == "__main__":
    main()
