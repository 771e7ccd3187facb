"""e3 prune: a plan applied to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e3pruner import PruningPlan
from e3pruner import prune as prune_model
from e3pruner.cli import options
from e3pruner.cli.command import stderr
from e3pruner.cli.config import result_folder
from e3pruner.models.loading import copy_tokenizer, load_model
from e3pruner.surgery.plan import PLAN_FILE


def prune(
    ctx: typer.Context,
    model: options.Model,
    plan: Annotated[Path, typer.Option(help="The plan: pruning.json of `e3 search`.", exists=True, dir_okay=False)],
    out: options.Out,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    trust_remote_code: options.TrustRemoteCode = False,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Cut the layers of a plan out of a model and save a vanilla Hugging Face checkpoint.

    The folder loads with `AutoModelForCausalLM.from_pretrained`, without this package; that its logits are those of the
    model with the layers skipped is checked before anything is written.

    Example: `e3 prune --model smollm2 --plan searched/pruning.json --out pruned`
    """
    chosen = PruningPlan.load(plan)
    with result_folder(ctx, out, force) as folder:
        prune_model(load_model(model, "cpu", dtype, trust_remote_code=trust_remote_code), chosen).save_pretrained(
            folder
        )
        if not copy_tokenizer(model, folder):
            stderr.print(f"{model} has no tokenizer beside it, so {out} has none either")
        chosen.save(folder / PLAN_FILE)
    print(f"{out}: {len(chosen.kept)} of {chosen.num_layers} layers kept, removed {chosen.removed}")
