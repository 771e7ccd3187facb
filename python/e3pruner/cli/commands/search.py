"""e3 search: which layers may go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from transformers import PreTrainedModel

import e3pruner
from e3pruner.cli import options
from e3pruner.cli.config import parse_options
from e3pruner.cli.output import output_folder
from e3pruner.cli.results import run_results
from e3pruner.evaluation import layers_to_drop
from e3pruner.mask_search import METHODS
from e3pruner.models.loading import load_model, load_tokenizer
from e3pruner.pipelines.results import search_results
from e3pruner.report import save_results
from e3pruner.surgery.plan import PLAN_FILE
from e3pruner.text.splits import batches, take, token_splits

CHECKPOINT = "search.checkpoint.json"
DEFAULT_DROP = 8


def search(
    ctx: typer.Context,
    model: options.Model,
    out: options.Out,
    drop: Annotated[
        int | None, typer.Option(help="Number of layers to remove; 8 where no other target is given.")
    ] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the layers to remove, instead of --drop.")] = None,
    parameters: Annotated[float | None, typer.Option(help="Parameters to be left at most, instead of --drop.")] = None,
    latency: Annotated[
        float | None, typer.Option(help="Milliseconds a decoded token may take, measured here, instead of --drop.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "gumbel-topk",
    protect: Annotated[list[int] | None, typer.Option(help="A layer that must stay; may be repeated.")] = None,
    granularity: Annotated[str, typer.Option(help="layer; or sublayer: attentions and MLPs one by one.")] = "layer",
    quota: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND=NUMBER", help="How many of a kind of layer go, such as sliding_attention=6."),
    ] = None,
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

    `e3 search --model smollm2 --latency 60 --out searched`

    `e3 search --model smollm2 --granularity sublayer --drop 12 --out searched`
    """
    extra = parse_options(option)
    kinds = parse_options(quota) or None
    splits = token_splits(load_tokenizer(model), text, length=length, seed=seed)
    calibration = batches(take(splits.calibration, sequences, "--sequences"), batch)
    network = load_model(model, device, dtype)
    count = number_to_drop(network, drop, kinds, protect or (), fraction, parameters, latency)
    with output_folder(ctx, out, force) as folder:
        checkpoint = folder / CHECKPOINT
        plan = e3pruner.search(
            network,
            calibration,
            count,
            method,
            seed,
            protect or (),
            granularity=granularity,
            quota=kinds,
            checkpoint=checkpoint,
            **extra,
        )
        plan.save(folder / PLAN_FILE)
        title = f"{model}: {plan.num_layers} to {len(plan.kept)} layers by {method}"
        save_results(run_results(ctx, title) | search_results(plan), folder)
        checkpoint.unlink()
    parts = "".join(f", {kind} of {layers}" for kind, layers in plan.sublayers.items() if layers)
    Console(highlight=False, soft_wrap=True).print(
        f"{out / PLAN_FILE}: remove {plan.removed}{parts}; "
        f"KL {plan.metrics['kl']:.3f} nats a token on the calibration text"
    )


def number_to_drop(
    model: PreTrainedModel,
    drop: int | None,
    quota: dict[str, int] | None,
    protect: Sequence[int],
    fraction: float | None,
    parameters: float | None,
    milliseconds: float | None,
) -> int:
    """What --drop says, or what meets the other target; ValueError where both are given."""
    if (fraction, parameters, milliseconds) == (None, None, None):
        return drop if drop is not None else sum(quota.values()) if quota else DEFAULT_DROP
    if drop is not None:
        raise ValueError(f"--drop {drop} is one target, --fraction, --parameters or --latency another; give one")
    return layers_to_drop(model, fraction=fraction, parameters=parameters, milliseconds=milliseconds, protect=protect)
