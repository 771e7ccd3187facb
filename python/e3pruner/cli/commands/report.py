"""e3 report: the HTML report of a finished run, built again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e3pruner.report import build_report


def report(
    folder: Annotated[Path, typer.Argument(help="Result folder of `e3 demo`, `search`, `distill` or `eval`.")],
) -> None:
    """Build report.html and the plots (PNG) again from the results.json of a run.

    Example: `e3 report demo-out`
    """
    print(build_report(folder))
