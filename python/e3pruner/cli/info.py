"""e3 info: versions, backends and why."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import e3kernels
from e3pruner.report import describe_environment


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show this machine, the versions, and which backend serves each operation and why.

    Example: `e3 info --json > info.json`
    """
    facts: dict[str, Any] = {**describe_environment(), "e3kernels": e3kernels.info()}
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
        return
    console = Console()
    for title, section in facts.items():
        console.print(section_table(title, section if isinstance(section, dict) else {title: section}))


def section_table(title: str, section: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    for key, value in section.items():
        text = "; ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(str(key), text)
    return table
