"""e3 search: which layers may go."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

import e3pruner
from e3pruner.cli import options
from e3pruner.cli.config import parse_options
from e3pruner.cli.models import load_model, load_tokenizer
from e3pruner.cli.output import PLAN_FILE, output_folder
from e3pruner.cli.results import run_results, search_results
from e3pruner.cli.text import batches, take, token_splits
from e3pruner.report import save_results
from e3pruner.search import METHODS

CHECKPOINT = "search.checkpoint.json"


def search(
    ctx: typer.Context,
    model: options.Model,
    out: options.Out,
    drop: Annotated[int, typer.Option(help="Number of layers to remove.")] = 8,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "gumbel-topk",
    protect: Annotated[list[int] | None, typer.Option(help="A layer that must stay; may be repeated.")] = None,
    text: options.Text = None,
    sequences: options.Sequences = 8,
    length: options.Length = 256,
    batch: options.Batch = 4,
    option: options.MethodOptions = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.DtypeOption = options.Dtype.AUTO,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Search the layers whose removal changes the model's predictions least, and write the plan as pruning.json.

    Examples:

    `e3 search --model smollm2 --drop 8 --out searched`

    `e3 search --model my-model --text my.txt --method greedy --protect 0 --protect 1 --out searched`
    """
    extra = parse_options(option)
    splits = token_splits(load_tokenizer(model), text, length=length, seed=seed)
    calibration = batches(take(splits.calibration, sequences, "--sequences"), batch)
    network = load_model(model, device, dtype)
    with output_folder(ctx, out, force) as folder:
        checkpoint = folder / CHECKPOINT
        plan = e3pruner.search(network, calibration, drop, method, seed, protect or (), checkpoint=checkpoint, **extra)
        plan.save(folder / PLAN_FILE)
        title = f"{model}: {plan.num_layers} to {len(plan.kept)} layers by {method}"
        save_results(run_results(ctx, title) | search_results(plan), folder)
        checkpoint.unlink()
    Console(highlight=False, soft_wrap=True).print(
        f"{out / PLAN_FILE}: remove {plan.removed}; KL {plan.metrics['kl']:.3f} nats a token on the calibration text"
    )
