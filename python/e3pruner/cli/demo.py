"""e3 demo: the whole way on a real model, in one command."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from e3pruner.cli import options
from e3pruner.cli.models import BUILT_IN
from e3pruner.cli.output import output_folder
from e3pruner.cli.pipeline import FULL, QUICK, run_pipeline
from e3pruner.cli.tables import result_table


def demo(
    ctx: typer.Context,
    drop: Annotated[int, typer.Option(min=1, help="Number of layers to remove.")] = 8,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tokens and steps: minutes instead of ten.")] = False,
    model: options.Model = BUILT_IN,
    text: options.Text = None,
    out: options.Out = options.Path("demo-out"),
    seed: options.Seed = 0,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Search, cut, recover, export, compare and report: everything, on SmolLM2-135M-Instruct by default.

    Leaves in --out: the pruned and the recovered model as Hugging Face folders, pruning.json, results.json, report.html
    and the plots. Interrupt it when you like: the same command goes on from the last finished stage or checkpoint.

    Examples: `e3 demo --quick`, `e3 demo --drop 12 --out deep`
    """
    with output_folder(ctx, out, force) as folder:
        results = run_pipeline(ctx, folder, QUICK if quick else FULL)
    console = Console(width=None if Console().is_terminal else 110)
    console.print(result_table(results))
    console.print(f"{out / 'report.html'}", highlight=False)
