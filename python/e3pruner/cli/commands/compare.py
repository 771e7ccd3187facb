"""e3 compare: search methods side by side, on the same tokens, judged on text that none of them saw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from e3pruner.cli import options
from e3pruner.cli.command import command_line
from e3pruner.pipelines import Comparison
from e3pruner.pipelines.comparison import TABLE_FILE
from e3pruner.report import REPORT_FILE


def compare(
    matrix: Annotated[Path, typer.Argument(help="YAML of the comparison.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="Folder for the results; cells that it holds are not measured again.")],
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Run methods × numbers of removed layers × seeds × recoveries and write the cells, a table, a report and plots.

    A seed draws the calibration tokens, which are the same for every method. After an interrupt the same command goes
    on with the cell it was at; a changed matrix measures only the cells that are new.

    Example: `e3 compare bench/search/matrix.yaml --out compared`
    """
    comparison = Comparison.from_yaml(matrix, out, device, trust_remote_code=trust_remote_code)
    columns = (TextColumn("compare"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(list(comparison.matrix.cells())))
        rows = comparison.run(lambda row: bar.update(task, advance=1, description=f"{row['method']}, −{row['drop']}"))
    comparison.save(rows, {"command": command_line()})
    print((out / TABLE_FILE).read_text(encoding="utf-8"))
    print(out / REPORT_FILE)
