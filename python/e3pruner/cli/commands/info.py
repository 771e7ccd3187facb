"""e3 info: versions, backends and why."""

from __future__ import annotations

import json
from typing import Annotated

import typer
import yaml

import e3kernels
from e3pruner.report import describe_environment
from e3pruner.storage import cache_home

KERNEL_FACTS = ("cpu", "accelerator", "operations", "unavailable_backends", "native_modules", "build")


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False) -> None:
    """Show this machine, the versions, which backend serves each operation and why, how it was built, and its caches.

    Example: `e3 info --json > info.json`
    """
    kernels = e3kernels.info()
    facts = describe_environment() | {name: kernels[name] for name in KERNEL_FACTS}
    facts["caches"] = {"e3": str(cache_home()), **kernels["caches"]}
    print(json.dumps(facts, indent=2) if as_json else yaml.safe_dump(facts, sort_keys=False, width=120))
