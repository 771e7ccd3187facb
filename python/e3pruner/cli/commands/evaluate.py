"""e3 eval: how good, how large, how fast."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

import e3pruner
from e3pruner.cli import options
from e3pruner.cli.command import command_line
from e3pruner.cli.config import resolved, result_folder
from e3pruner.cli.tables import print_table, print_tasks, print_writing
from e3pruner.evaluation import evaluate_tasks, speeds
from e3pruner.models import output_head
from e3pruner.models.loading import load_model, load_tokenizer
from e3pruner.models.vocabulary import common_vocabulary, tokenizer_size
from e3pruner.pipelines.results import run_results, speed_results, writing_results
from e3pruner.report import save_results
from e3pruner.text.files import naming, read_text
from e3pruner.text.splits import batches, take, token_splits


def evaluate(
    ctx: typer.Context,
    model: options.Model,
    teacher: options.Teacher = None,
    text: options.Text = None,
    held_out: options.HeldOut = 16,
    length: options.Length = 256,
    batch: options.Batch = 4,
    speed: options.Speed = True,
    task: Annotated[
        list[str] | None, typer.Option(help="Task of lm-evaluation-harness to score as well; may be repeated.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder of YAML files that define the tasks, in place of the harness's own.")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Let each model write, and count loops, distinct bigrams, right answers.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file of prompts to write from, one per line; built-in ones without it.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each text that --generate writes.")] = 192,
    vocabulary: options.Vocabulary = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.AUTO,
    placement: options.PlacementOption = options.Placement.WHOLE,
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[Path | None, typer.Option(help="Folder to keep the figures in, as results.json.")] = None,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Measure perplexity on held-out text, size and speed, and with --teacher the KL and the top-1 agreement.

    Examples:

    `e3 eval --model recovered --teacher smollm2`

    `e3 eval --model recovered --text my.txt --no-speed --out figures`

    `e3 eval --model recovered --teacher smollm2 --task my_task --task-folder tasks`

    `e3 eval --model recovered --teacher smollm2 --generate`
    """
    if prompts is not None and not generate:
        raise ValueError(f"--prompts {prompts} is for --generate, which is not given")
    asked = None if prompts is None else _lines(prompts)
    names = [name for name in (teacher, model) if name is not None]
    with nullcontext() if out is None else result_folder(ctx, out, force) as folder:
        tokenizer = load_tokenizer(names[0], trust_remote_code=trust_remote_code)
        tokens = token_splits(tokenizer, text, length=length, seed=seed).held_out
        sequences = batches(take(tokens, held_out, "--held-out"), batch)
        networks = {
            name: load_model(name, device, dtype, placement=placement, trust_remote_code=trust_remote_code)
            for name in names
        }
        sizes = {name: output_head(network).weight.shape[0] for name, network in networks.items()}
        columns = common_vocabulary(sizes, vocabulary, tokenizer_size(tokenizer))  # the same ones for all
        # First, so that a task that is not defined is said before anything is measured.
        scores = {
            name: evaluate_tasks(network, tokenizer, task, folder=task_folder, batch_size=batch, seed=seed)
            for name, network in networks.items()
            if task
        }
        dense = networks[teacher] if teacher is not None else None
        rows = [
            {"name": name} | e3pruner.evaluate(network, sequences, dense, vocabulary=columns)
            for name, network in networks.items()
        ]
        about = run_results(f"{model} on held-out text", resolved(ctx)) | {"command": command_line()}
        results = about | {"models": rows}
        if task:
            results["tasks"] = scores
        if speed:
            results |= speed_results(rows, speeds(networks))
        if generate:
            options: dict[str, Any] = {"prompts": asked, "max_new_tokens": max_new_tokens, "seed": seed}
            results |= writing_results(networks, tokenizer, **options)
        if folder is not None:
            save_results(results, folder)
    print_table(results)
    if task:
        print_tasks(scores)
    if generate:
        print_writing(results)


def _lines(path: Path) -> list[str]:
    """The lines that hold text. Raises ValueError or OSError naming the option and the file where there are none."""
    with naming("--prompts", path):
        return [line for line in read_text(path).splitlines() if line.strip()]
