"""e3 run: the whole way, as one YAML file says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e3pruner.cli import options
from e3pruner.cli.config import load_config, parse_options
from e3pruner.cli.output import output_folder
from e3pruner.cli.results import run_results
from e3pruner.cli.tables import print_table
from e3pruner.mask_search import METHODS as SEARCHES
from e3pruner.mask_search.checks import check_drop
from e3pruner.models import find_layers
from e3pruner.models.loading import load_model, load_tokenizer, weights_dtype
from e3pruner.pipelines.rounds import RECOVERED, Rounds, Schedule
from e3pruner.recovery import DistillOptions
from e3pruner.recovery.compensation import METHODS as COMPENSATIONS
from e3pruner.recovery.tracking import check_tracker
from e3pruner.report import build_report, save_results
from e3pruner.text.splits import take, token_splits

Pairs = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of that step; may be repeated.")]


def run(
    ctx: typer.Context,
    config: Annotated[
        Path, typer.Argument(help="YAML file with these options.", is_eager=True, callback=load_config, exists=True)
    ],
    model: options.Model,
    out: options.Out,
    drop: Annotated[int, typer.Option(help="Number of layers to remove, over all rounds.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Prune and recover in so many rounds.")] = 1,
    method: Annotated[str, typer.Option(help="How the layers are searched, as in `e3 search`.")] = "gumbel-topk",
    search: Pairs = None,
    compensate: Annotated[str, typer.Option(help="none, scale, least-squares, or auto with --judge.")] = "none",
    judge: Annotated[
        Path | None,
        typer.Option(help="Text of another kind than --text, on which --compensate auto judges; read as --text is."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each round.")] = 50,
    recover: Pairs = None,
    track: options.Track = None,
    cached: Annotated[bool, typer.Option("--cached", help="Train from a teacher cache made first.")] = False,
    text: options.Text = None,
    length: options.Length = 256,
    sequences: options.Sequences = 16,
    held_out: options.HeldOut = 16,
    batch: options.Batch = 4,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.SavedDtype = options.Dtype.AUTO,
    force: options.Force = False,
) -> None:
    """Search, cut, compensate, recover and report, in one or several rounds, as a YAML file says.

    The keys of the file are the options below; `search` and `recover` hold options of the library calls. Interrupted or
    killed at any point, the same command goes on. Leaves in --out the recovered model, pruning.json, results.json and
    report.html.

    Example: `e3 run pipeline.yaml`, the file holding for instance

    `{model: smollm2, drop: 8, rounds: 2, steps: 100, recover: {trainable: all, lr: 2.0e-4}, out: run}`
    """
    for option, value, choices in (("method", method, SEARCHES), ("compensate", compensate, ("auto", *COMPENSATIONS))):
        if value not in choices:
            raise ValueError(f"--{option} {value} must be one of {', '.join(choices)}")
    if (compensate == "auto") != (judge is not None):
        raise ValueError("--compensate auto needs --judge, text of another kind than --text; and nothing else takes it")
    settings = {"steps": steps, "batch_size": batch, **parse_options(recover)}
    DistillOptions(**settings)
    check_tracker(track)
    dense, tokenizer = load_model(model, device, options.Dtype.FLOAT32), load_tokenizer(model)
    saved = weights_dtype(model, dtype)
    check_drop(drop, len(find_layers(dense)))
    if rounds > drop:
        raise ValueError(f"--rounds {rounds} must not exceed --drop {drop}: each round removes a layer at least")
    tokens = token_splits(tokenizer, text, length=length, seed=seed)
    calibration = take(tokens.calibration, sequences, "--sequences")
    evaluated = take(tokens.held_out, held_out, "--held-out")
    other = None if judge is None else token_splits(tokenizer, judge, length=length, seed=seed).training
    schedule = Schedule(drop, rounds, method, parse_options(search), compensate, settings, cached, track, seed)
    with output_folder(ctx, out, force) as folder:
        work = Rounds(
            folder,
            saved,
            dense=dense,
            tokenizer=tokenizer,
            training=tokens.training,
            calibration=calibration,
            judge=None if other is None else other[:sequences],
            held_out=evaluated,
            schedule=schedule,
            batch=batch,
        )
        layers = len(find_layers(dense))
        results = run_results(ctx, f"{model}, {layers} to {layers - drop} layers") | work.run()
        save_results(results, folder)
        build_report(folder)
        work.clean()
    print_table(results)
    print(out / RECOVERED)
