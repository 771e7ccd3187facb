"""e3 bench: the kernels against their peers and their physical floor, and against an earlier run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

import e3pruner
from e3pruner.cli.children import run_child
from e3pruner.cli.command import FAILURE
from e3pruner.cli.tables import console, rich_table
from e3pruner.report.benchmarks import Change, compare, read, slower
from e3pruner.storage import locked


def bench(
    out: Annotated[
        Path, typer.Option(help="JSON lines, the table beside it as .md; rows of cases not measured now stay.")
    ] = Path("bench.jsonl"),
    only: Annotated[
        str | None, typer.Option(help="Run the cases that match, as pytest's -k: 'topk_kl and e3'.")
    ] = None,
    compare_with: Annotated[
        Path | None, typer.Option("--compare", help="JSON lines of an earlier run to compare the new times with.")
    ] = None,
    fail_if_slower: Annotated[
        str | None, typer.Option(help="Exit with 1 if a case lost more than this against --compare, such as 5%.")
    ] = None,
) -> None:
    """Measure every kernel, its peers and the physical floor: minutes on a quiet machine, from a source tree.

    The providers of a case take turns, in rounds, until each time is known to 2 % or its share of time is used up; what
    is not reliable is said first. Times are compared relative to the floor that each run measured, so that a slower
    machine is not slower code, and a change within the scatter of both runs is none.

    Examples:

    `e3 bench --out before.jsonl`

    `e3 bench --compare before.jsonl --fail-if-slower 5%`
    """
    limit = None if fail_if_slower is None else share_of(fail_if_slower)
    if limit is not None and compare_with is None:
        raise ValueError(f"--fail-if-slower {fail_if_slower} needs --compare, the run to be slower than")
    old = None if compare_with is None else read(compare_with)
    if out.exists():
        read(out)  # minutes later the new rows will join these
    measure(out, only)
    if old is None:
        return
    changes = compare(old, read(out))
    if not changes:
        raise ValueError(f"--compare {compare_with} has none of the cases in {out}")
    print_changes(changes)
    if limit is not None and (lost := slower(changes, limit)):
        print(f"{len(lost)} of {len(changes)} cases are more than {fail_if_slower} slower")
        raise typer.Exit(FAILURE)


def share_of(percent: str) -> float:
    """0.05 for "5%"."""
    number = percent.removesuffix("%")
    try:
        share = float(number) / 100
    except ValueError:
        share = -1.0
    if number == percent or not 0 <= share < float("inf"):
        raise ValueError(f"--fail-if-slower is {percent!r}; it must be a percentage such as 5%")
    return share


def suites() -> Path:
    """The folder of the benchmarks, in the source tree that the package or the working directory lies in.

    FileNotFoundError outside of both.
    """
    places = (Path(e3pruner.__file__).parents[2], Path.cwd(), *Path.cwd().parents)
    for place in places:
        if (place / "bench" / "ops" / "bench_entropy_kl.py").is_file():
            return place / "bench" / "ops"
    raise FileNotFoundError(
        f"{Path.cwd()} is no source tree, and {places[0]} has none: the benchmarks are in the repository, not in the "
        "package; run e3 bench there"
    )


def check_needs(only: str | None) -> None:
    """Raises ModuleNotFoundError, before minutes of measuring, for what the suites cannot do without.

    A selection may do without peers; what runs every case may not.
    """
    needed = {"pytest"} if only else {"pytest", "trl", "ninja"}
    if missing := sorted(name for name in needed if importlib.util.find_spec(name) is None):
        raise ModuleNotFoundError(f"not installed: {', '.join(missing)}; pip install 'e3kernels[bench]'")


def measure(out: Path, only: str | None) -> None:
    """Run the suites into `out`; what they print goes to the terminal."""
    folder = suites()
    check_needs(only)
    selection = [] if only is None else ["-k", only]
    root = folder.parents[1]
    command = [sys.executable, "-m", "pytest", "-c", str(root / "pyproject.toml"), "--rootdir", str(root), str(folder)]
    options = ["-p", "no:cacheprovider", "--jsonl", str(out.resolve())]
    with locked(out):
        code = run_child([*command, *options, *selection])
    if code:
        raise RuntimeError(f"the benchmarks ended with exit code {code}; what they print says why")


def print_changes(changes: list[Change]) -> None:
    """One row a case, the slowest first: times relative to the floor of their own run."""
    rows = [
        [
            " ".join(str(part) for part in change.case if part is not None),
            f"{change.before:.3g}",
            f"{change.after:.3g}",
            f"{change.factor - 1:+.1%} ± {change.margin:.1%}",
        ]
        for change in changes
    ]
    console().print(rich_table("× floor, before and now", ["case", "before", "now", "change"], rows))
