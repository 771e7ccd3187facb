"""e3 eval: how good, how large, how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import e3pruner
from e3pruner.cli import options
from e3pruner.cli.models import load_model, load_tokenizer
from e3pruner.cli.output import output_folder
from e3pruner.cli.results import run_results
from e3pruner.cli.tables import result_table
from e3pruner.cli.text import batches, take, token_splits
from e3pruner.evaluation import latency
from e3pruner.models import find_layers
from e3pruner.report import save_results


def evaluate(
    ctx: typer.Context,
    model: options.Model,
    teacher: Annotated[str | None, typer.Option(help="The dense model to compare with; as --model.")] = None,
    text: options.Text = None,
    held_out: options.HeldOut = 16,
    length: options.Length = 256,
    batch: options.Batch = 4,
    speed: Annotated[bool, typer.Option(help="Measure decode and prefill speed too.")] = True,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.DtypeOption = options.Dtype.AUTO,
    out: Annotated[Path | None, typer.Option(help="Folder to keep the figures in (results.json).")] = None,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Measure perplexity on held-out text, size and speed, and with --teacher the KL and the top-1 agreement.

    Examples:

    `e3 eval --model recovered --teacher smollm2`

    `e3 eval --model recovered --text my.txt --no-speed --out figures`
    """
