"""e3 report: the HTML report of a finished run, built again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e3pruner.pipelines.output import add_files, files_of
from e3pruner.report import build_report


def report(
    folder: Annotated[Path, typer.Argument(help="Result folder of `e3 demo`, `search`, `distill` or `eval`.")],
) -> None:
    """Build report.html and the plots (PNG) again from the results.json of a run.

    Example: `e3 report demo-out`
    """
    before = files_of(folder) if folder.is_dir() else []
    page = build_report(folder)
    add_files(folder, set(files_of(folder)) - set(before))
    print(page)
