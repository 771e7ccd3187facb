"""e3 distill: recovery of a pruned model."""

from __future__ import annotations

import shutil
from typing import Annotated, Any

import typer

import e3pruner
from e3pruner.cli import options
from e3pruner.cli.config import parse_options
from e3pruner.cli.models import copy_tokenizer, load_model, load_tokenizer
from e3pruner.cli.output import output_folder
from e3pruner.cli.results import recovery_results, run_results
from e3pruner.cli.text import take, token_splits
from e3pruner.recovery.state import STATE
from e3pruner.report import save_results

TRAINING = "training"


def distill(
    ctx: typer.Context,
    model: options.Model,
    teacher: options.Teacher,
    out: options.Out,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps; one pass over the text if not given.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    text: options.Text = None,
    length: options.Length = 256,
    held_out: options.HeldOut = 16,
    batch: options.Batch = 4,
    option: options.MethodOptions = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Train a pruned model to predict what its teacher predicts, and save a vanilla Hugging Face checkpoint.

    States are saved on the way, so an interrupted run goes on to the same weights. Everything that
    `e3pruner.distill` takes can be given as --option: weighting, kd_ratio, temperature, trainable, precision, ...

    Examples:

    `e3 distill --model pruned --teacher smollm2 --steps 50 --out recovered`

    `e3 distill --model pruned --teacher my-model --text my.txt --option save_every=20 --out recovered`
    """
    extra = parse_options(option)
    tokens = token_splits(load_tokenizer(teacher), text, length=length, seed=seed)
    evaluated = take(tokens.held_out, held_out, "--held-out")
    student = load_model(model, device, options.Dtype.FLOAT32)
    source = load_model(teacher, device)
    with output_folder(ctx, out, force) as folder:
        settings: dict[str, Any] = {"steps": steps, "lr": lr, "batch_size": batch, "seed": seed, **extra}
        training = folder / TRAINING
        result = e3pruner.distill(
            student,
            teacher=source,
            data=tokens.training,
            held_out=evaluated,
            output=training,
            resume=(training / STATE).exists(),
            **settings,
        )
        student.save_pretrained(folder)
        copy_tokenizer(teacher, folder)
        save_results(run_results(ctx, f"{model}, distilled from {teacher}") | recovery_results(result), folder)
        shutil.rmtree(training)
    last = result.held_out[-1]
    print(f"{out}: held-out KL {last['kl']:.3f}, perplexity {last['perplexity']:.2f} after {result.steps} steps")
