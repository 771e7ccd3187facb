"""Options from a YAML file, and the resolved options of a run as such a file."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import typer
import yaml

from e3pruner.cli.command import name_of
from e3pruner.storage import replacing_file

CONFIG_FILE = "e3.yaml"
NOT_CONFIGURATION = {"config", "force"}


def load_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's values the defaults of this command's options, so that the command line wins.

    Keys are the options' names, with `-` or `_`. Raises `typer.BadParameter` for a file that is not a YAML mapping and
    for keys that are no option of this command, by name.
    """
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} must hold one mapping of option names to values, not {type(values).__name__}")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    known = {parameter.name for parameter in ctx.command.params} - {"config", "help"}
    if unknown := sorted(values.keys() - known):
        names = ", ".join(sorted(str(name) for name in known))
        raise typer.BadParameter(f"{path} has unknown keys: {', '.join(unknown)}; {name_of(ctx)} knows: {names}")
    ctx.default_map = {key: as_argument(value) for key, value in values.items()}
    return path


def as_argument(value: Any) -> Any:
    """A YAML mapping as the list of NAME=VALUE that the command line would give; everything else as it is."""
    return [f"{name}={yaml_scalar(item)}" for name, item in value.items()] if isinstance(value, dict) else value


def yaml_scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE pairs as keyword arguments, each value read as YAML (`steps=60`, `polish=true`, `tau=[1, 0.05]`)."""
    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not (equals and name.isidentifier()):
            raise ValueError(f"--option must be NAME=VALUE, got {pair!r}")
        options[name] = yaml.safe_load(value)
    return options


def resolved(ctx: typer.Context) -> dict[str, Any]:
    """Every option of this run by its name, whichever source it came from, as YAML can hold it."""
    return {name: plain(value) for name, value in ctx.params.items() if name not in NOT_CONFIGURATION}


def plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def save_config(ctx: typer.Context, path: Path) -> None:
    """Writes the resolved options to `path`, ready for `--config`."""
    head = f"# The options of this run; {name_of(ctx)} --config {path.name} takes them again.\n"
    with replacing_file(path) as temporary:
        temporary.write_text(head + yaml.safe_dump(resolved(ctx), sort_keys=False), encoding="utf-8")
