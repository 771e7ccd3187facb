"""e3 plan: what can be done with a model, and why not."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Annotated

import typer

from e3pruner.cli import options
from e3pruner.cli.tables import console, rich_table
from e3pruner.pipelines.forecast import Forecast, Sizes, forecast, machine
from e3pruner.pipelines.outlook import outlook


def plan(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, a model on the Hub, or `smollm2`.")],
    device: Annotated[
        str | None, typer.Option(help="Machine of a data sheet, h100 or h100:8; this one, measured, without it.")
    ] = None,
    drop: Annotated[int | None, typer.Option(min=1, help="Layers to remove.", show_default="a quarter of them")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the search and of an evaluation.")] = 4096,
    training: Annotated[int, typer.Option(min=1, help="Tokens of the recovery.")] = 65_536,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Say from its configuration alone what can be done with a model, why not, and what it takes in memory and time.

    No weights are read. Without --device this machine's memory and products are measured for some seconds.

    Examples:

    `e3 plan smollm2`

    `e3 plan Qwen/Qwen3-32B --device h100:8`
    """
    found = outlook(model, trust_remote_code=trust_remote_code)
    ahead = None
    if found.sizes is not None:
        ahead = forecast(found.sizes, machine(device), drop=drop, tokens=tokens, training=training)
    if as_json:
        print(json.dumps(found.to_dict() | {"forecast": ahead and asdict(ahead)}, indent=2))
        return
    rows = [[name, "yes" if answer.yes else "no", answer.why] for name, answer in found.answers.items()]
    size = "" if found.layers is None else f", {found.layers} layers"
    table = rich_table(f"{found.model} ({found.model_type}{size})", ["", "", "why"], rows)
    table.columns[2].justify = "left"
    console().print(table)
    if found.sizes is not None and ahead is not None:
        _print_forecast(found.sizes, ahead)


def _print_forecast(sizes: Sizes, ahead: Forecast) -> None:
    on, left = ahead.machine, (sizes.layers - ahead.drop) / sizes.layers
    rows = [
        [need.stage, need.placement, _bytes(need.memory), "yes" if need.fits else "no", _seconds(need.seconds)]
        for need in ahead.needs
    ]
    removed = "1 layer" if ahead.drop == 1 else f"{ahead.drop} layers"
    title = f"{removed} removed on {on.name}, {_bytes(on.memory)} per device"
    columns = ["stage", "placement", "memory per device", "fits", "time, at least"]
    console().print(rich_table(title, columns, rows))
    known = "measured now" if on.measured else "half of its data sheet's products and bytes a second"
    after = sizes.outside + (sizes.weights - sizes.outside) * left
    console().print(
        f"Weights {_bytes(sizes.weights)}, then {_bytes(after)}; keys and values of a token {_bytes(sizes.kv)}, then "
        f"{_bytes(sizes.kv * left)}.\nSearch and evaluation on {ahead.tokens:,} tokens, recovery on {ahead.training:,} "
        f"in steps of 1,024; {known}; a disk of {on.disk / 1e9:g} GB/s; a search of 0.7 passes per layer, as the "
        "default makes on SmolLM2. help(e3pruner.pipelines.forecast) has the formulas."
    )


def _bytes(count: float) -> str:
    """With three digits, in units of 1024."""
    power = min(4, int(math.log(max(count, 1), 1024)))
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
