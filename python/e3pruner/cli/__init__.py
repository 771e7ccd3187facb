"""The `e3` command: one sub-command a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import transformers
import typer

import e3kernels
from e3pruner.cli.command import Command
from e3pruner.cli.commands import (
    bench,
    cache_teacher,
    compare,
    demo,
    distill,
    evaluate,
    generate,
    info,
    profile,
    prune,
    report,
    run,
    search,
)

app = typer.Typer(name="e3", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")


def say_version(wanted: bool) -> None:
    if wanted:
        print(f"e3kernels {e3kernels.__version__}")
        raise typer.Exit


@app.callback()
def e3(
    version: Annotated[
        bool, typer.Option("--version", callback=say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Prune whole layers of a language model: search a mask, cut, recover by distillation, show what happened.

    Try `e3 demo --quick` first. Step by step:

    - `e3 search --model smollm2 --drop 8 --out searched`
    - `e3 prune --model smollm2 --plan searched/pruning.json --out pruned`
    - `e3 distill --model pruned --teacher smollm2 --steps 50 --out recovered`
    - `e3 eval --model recovered --teacher smollm2`

    Or all of it from one file: `e3 run pipeline.yaml`.

    Exit codes: 0 done, 1 failed while running, 2 wrong usage or input, 130 interrupted (the same command goes on).
    """
    # Our own bars show progress; transformers' would show the loading and saving of every model.
    transformers.utils.logging.disable_progress_bar()


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "info": info.info,
    "run": run.run,
    "search": search.search,
    "prune": prune.prune,
    "cache-teacher": cache_teacher.cache_teacher,
    "distill": distill.distill,
    "eval": evaluate.evaluate,
    "generate": generate.generate,
    "compare": compare.compare,
    "report": report.report,
    "bench": bench.bench,
}
for name, function in COMMANDS.items():
    app.command(name, cls=Command)(function)
app.add_typer(profile.app, name="profile")
