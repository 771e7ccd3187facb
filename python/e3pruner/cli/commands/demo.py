"""e3 demo: the whole way on a real model, in one command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from e3pruner.cli import options
from e3pruner.cli.output import output_folder
from e3pruner.cli.results import run_results
from e3pruner.cli.tables import print_table
from e3pruner.mask_search.checks import check_drop
from e3pruner.models import find_layers
from e3pruner.models.loading import BUILT_IN, load_model, load_tokenizer, weights_dtype
from e3pruner.pipelines.pipeline import FULL, METHOD, QUICK, Pipeline
from e3pruner.report import REPORT_FILE, build_report, save_results
from e3pruner.text.splits import token_splits

BUILT_IN_TITLE = "SmolLM2-135M-Instruct"
SUMMARY = f"Layers chosen by {METHOD}, cut out, the rest recovered by distillation from the dense model."


def demo(
    ctx: typer.Context,
    drop: Annotated[int, typer.Option(help="Number of layers to remove.")] = 8,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tokens and steps.")] = False,
    model: options.Model = BUILT_IN,
    text: options.Text = None,
    length: options.Length = 256,
    out: options.Out = Path("demo-out"),
    seed: options.Seed = 0,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Search, cut, recover, export, compare and report: everything, on SmolLM2-135M-Instruct by default.

    Leaves in --out: the pruned and the recovered model as Hugging Face folders, pruning.json, results.json, report.html
    and the plots. Interrupt it when you like: the same command goes on from the last finished stage or saved state.

    Examples:

    `e3 demo --quick`

    `e3 demo --drop 12 --out deep`
    """
    with output_folder(ctx, out, force) as folder:
        began = time.perf_counter()
        dense, tokenizer = load_model(model, dtype=options.Dtype.FLOAT32), load_tokenizer(model)
        layers = len(find_layers(dense))
        check_drop(drop, layers)  # the search would say so too, after the teacher has written its text
        tokens = token_splits(tokenizer, text, length=length, seed=seed, teacher=None if quick else dense)
        loading = round(time.perf_counter() - began, 1)
        pipeline = Pipeline(
            folder, weights_dtype(model), dense, tokenizer, tokens, QUICK if quick else FULL, drop, seed
        )
        title = f"{BUILT_IN_TITLE if model == BUILT_IN else model}, {layers} to {layers - drop} layers"
        results = run_results(ctx, title) | {"summary": SUMMARY} | pipeline.run()
        results["seconds"] = {"0-text": loading} | results["seconds"]
        save_results(results, folder)
        build_report(folder)
        pipeline.clean()
    print_table(results)
    print(out / REPORT_FILE)
