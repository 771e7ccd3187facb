"""e3 demo: the whole way on a real model, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from e3pruner.cli import options
from e3pruner.cli.command import command_line
from e3pruner.cli.config import resolved
from e3pruner.cli.tables import print_table
from e3pruner.models.loading import BUILT_IN
from e3pruner.pipelines import Pipeline
from e3pruner.report import REPORT_FILE

METHOD, RIVALS = "gumbel-topk", ["leave-one-out", "bi"]
UNSEEN = "code"  # of the standard library: no step reads any
SUMMARY = f"Layers chosen by {METHOD}, cut out, the rest recovered by distillation from the dense model."
PROMPTS = [
    "What is the capital of France?",
    "Explain in two sentences what a hash table is.",
    "Write the first sentence of a story about a lighthouse.",
]
FULL: dict[str, Any] = {"search": {"steps": 16}, "curve": 4, "sequences": 16, "held_out": 16}
QUICK: dict[str, Any] = {
    "search": {"steps": 4},
    "steps": 6,
    "sequences": 4,
    "held_out": 4,
    "new_tokens": 16,
    "writing": 2,
}


def demo(
    ctx: typer.Context,
    drop: options.Drop = None,
    fraction: options.Fraction = None,
    protect: options.Protect = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tokens and steps.")] = False,
    model: options.Model = BUILT_IN,
    text: options.Text = None,
    length: options.Length = 256,
    sequences: Annotated[int | None, typer.Option(min=1, help="Calibration sequences: 16, with --quick 4.")] = None,
    held_out: Annotated[int | None, typer.Option(min=1, help="Held-out sequences: 16, with --quick 4.")] = None,
    batch: options.Batch = 4,
    out: options.Out = Path("demo-out"),
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.SavedDtype = options.Dtype.AUTO,
    trust_remote_code: options.TrustRemoteCode = False,
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
    sizes = {"sequences": sequences, "held_out": held_out}
    pipeline = Pipeline(
        model=model,
        out=out,
        drop=drop,
        fraction=fraction,
        protect=protect or [],
        method=METHOD,
        rivals=RIVALS,
        text=text,
        unseen=UNSEEN,
        written=text is None and not quick,
        length=length,
        batch=batch,
        speed=True,
        prompts=PROMPTS,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        **(QUICK if quick else FULL) | {name: size for name, size in sizes.items() if size is not None},
    )
    about = {"summary": SUMMARY, "command": command_line()}
    results = pipeline.run(force=force, settings=resolved(ctx), command="e3 demo --config", about=about)
    print_table(results)
    print(out / REPORT_FILE)
