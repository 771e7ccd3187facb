"""What the sub-commands write into results.json, for the report."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import typer

from e3pruner.cli.config import resolved
from e3pruner.report import describe_environment


def run_results(ctx: typer.Context, title: str) -> dict[str, Any]:
    """What every run has: its title, where it ran, how it was called, with which options."""
    return {
        "title": title,
        "environment": describe_environment(),
        "command": shlex.join(["e3", *sys.argv[1:]]),
        "config": resolved(ctx),
    }
