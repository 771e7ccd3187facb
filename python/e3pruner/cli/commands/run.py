"""e3 run: the whole way, as one YAML file says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e3pruner.cli import options
from e3pruner.cli.command import command_line
from e3pruner.cli.config import load_config, parse_options
from e3pruner.cli.tables import print_table
from e3pruner.mask_search import METHODS
from e3pruner.pipelines import Pipeline
from e3pruner.pipelines.publishing import check_access, push
from e3pruner.pipelines.work import RECOVERED


def run(
    ctx: typer.Context,
    config: Annotated[
        Path,
        typer.Argument(
            help="YAML file with these options.", is_eager=True, callback=load_config, exists=True, dir_okay=False
        ),
    ],
    model: options.Model,
    out: options.Out,
    drop: options.Drop = None,
    fraction: options.Fraction = None,
    protect: options.Protect = None,
    rounds: Annotated[int, typer.Option(min=1, help="Prune and recover in so many rounds.")] = 1,
    method: Annotated[str, typer.Option(help=f"How layers are searched: {', '.join(METHODS)}.")] = "gumbel-topk",
    search: Annotated[list[str] | None, options.search_option("--search")] = None,
    rivals: Annotated[
        list[str] | None, typer.Option(help="Another method, whose mask is judged beside; may be repeated.")
    ] = None,
    curve: Annotated[
        int, typer.Option(min=0, help="Points of a curve of held-out KL over the number of removed layers.")
    ] = 0,
    compensate: Annotated[str, typer.Option(help="none, scale, least-squares, or auto with --judge.")] = "none",
    judge: Annotated[
        Path | None,
        typer.Option(help="Text of another kind than --text, on which --compensate auto judges; read as --text is."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each round.")] = 50,
    recover: Annotated[list[str] | None, options.recover_option("--recover")] = None,
    track: options.Track = None,
    cached: Annotated[bool, typer.Option("--cached", help="Train from a teacher cache made first.")] = False,
    text: options.Text = None,
    unseen: Annotated[
        str | None,
        typer.Option(help="Text of a kind that no step sees, to judge on too: manual, code, library, or a file."),
    ] = None,
    written: Annotated[bool, typer.Option("--written", help="Add training text that the model writes itself.")] = False,
    length: options.Length = 256,
    sequences: options.Sequences = 16,
    held_out: options.HeldOut = 16,
    batch: options.Batch = 4,
    speed: options.Speed = False,
    writing: options.Writing = 8,
    prompts: Annotated[
        list[str] | None, typer.Option(help="What the models answer at the end; may be repeated.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 48,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.SavedDtype = options.Dtype.AUTO,
    trust_remote_code: options.TrustRemoteCode = False,
    push_to_hub: options.PushToHub = None,
    force: options.Force = False,
) -> None:
    """Search, cut, compensate, recover and report, in one or several rounds, as a YAML file says.

    The keys of the file are the options below; `search` and `recover` hold options of the library calls. Interrupted or
    killed at any point, the same command goes on. Leaves in --out the recovered model, pruning.json, results.json and
    report.html.

    Example: `e3 run pipeline.yaml`, the file holding for instance

    `{model: smollm2, drop: 8, rounds: 2, steps: 100, recover: {trainable: all, lr: 2.0e-4}, out: run}`
    """
    given = {name: value for name, value in ctx.params.items() if name not in ("config", "force", "push_to_hub")}
    pairs = {name: parse_options(given[name], f"--{name}") for name in ("search", "recover")}
    lists = {name: list(given[name] or []) for name in ("protect", "rivals", "prompts")}
    check_access(push_to_hub)
    results = Pipeline(**given | pairs | lists).run(force=force, about={"command": command_line()})
    if push_to_hub is not None:
        push(out / RECOVERED, push_to_hub)
    print_table(results)
    print(out / RECOVERED)
