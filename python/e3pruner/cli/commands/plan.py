"""e3 plan: what can be done with a model, and why not."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from e3pruner.cli import options
from e3pruner.cli.tables import console, rich_table
from e3pruner.pipelines.outlook import outlook


def plan(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, a model on the Hub, or `smollm2`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Say from its configuration alone what can be done with a model: search, prune, distill, serve, and why not.

    No weights are read.

    Example: `e3 plan smollm2`
    """
    found = outlook(model, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    rows = [[name, "yes" if answer.yes else "no", answer.why] for name, answer in found.answers.items()]
    size = "" if found.layers is None else f", {found.layers} layers"
    table = rich_table(f"{found.model} ({found.model_type}{size})", ["", "", "why"], rows)
    table.columns[2].justify = "left"
    console().print(table)
