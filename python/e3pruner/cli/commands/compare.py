"""e3 compare: search methods side by side, on the same tokens, judged on text that none of them saw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from e3pruner.cli import options
from e3pruner.cli.results import run_results
from e3pruner.pipelines.comparison import CELLS_FILE, Comparison
from e3pruner.pipelines.matrix import load_matrix
from e3pruner.report import build_report, save_results
from e3pruner.report.comparison import markdown, summary
from e3pruner.storage import replacing_file

TABLE_FILE = "comparison.md"


def compare(
    ctx: typer.Context,
    matrix: Annotated[Path, typer.Argument(help="YAML of the comparison.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="Folder for the results; cells that it holds are not measured again.")],
    device: options.Device = "cpu",
) -> None:
    """Run methods × numbers of removed layers × seeds × recoveries and write the cells, a table, a report and plots.

    A seed draws the calibration tokens, which are the same for every method. After an interrupt the same command goes
    on with the cell it was at; a changed matrix measures only the cells that are new.

    Example: `e3 compare bench/search/matrix.yaml --out compared`
    """
    settings = load_matrix(matrix)
    if out.exists() and any(out.iterdir()) and not (out / CELLS_FILE).is_file():
        raise FileExistsError(f"--out {out} holds no {CELLS_FILE}, so no comparison goes on there; name another folder")
    comparison = Comparison.load(settings, out, device)
    columns = (TextColumn("compare"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(list(settings.cells())))
        rows = comparison.run(lambda row: bar.update(task, advance=1, description=f"{row['method']}, −{row['drop']}"))
    lines = summary(rows)
    title = settings.title or f"{settings.model}: {len(settings.methods)} methods, {len(settings.seeds)} seeds"
    results = run_results(ctx, title) | {"matrix": settings.settings(), "comparison": lines}
    save_results(results, out)
    with replacing_file(out / TABLE_FILE) as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    print((out / TABLE_FILE).read_text(encoding="utf-8"))
    print(build_report(out))
