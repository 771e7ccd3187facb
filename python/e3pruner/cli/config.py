"""Options from a YAML file, and the resolved options of a run as such a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import typer
import yaml

from e3pruner.cli.command import name_of
from e3pruner.models.device import usable_device
from e3pruner.pipelines.output import output_folder
from e3pruner.pipelines.settings import check_keys, parse_pairs, read_settings

NOT_CONFIGURATION = {"config", "force"}
PAIRS = "NAME=VALUE"


def load_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's values the defaults of this command's options, so that the command line wins.

    Keys are the options' names, with `-` or `_`. Raises `typer.BadParameter` for a file that is not a YAML mapping, for
    keys that are no option of this command, by name, and for values that the option could not have on the command line.
    """
    if path is None:
        return None
    known = {name: option for option in ctx.command.params for name in names_of(option)}
    try:
        values = read_settings(path)
        check_keys(str(path), values, [name for name in known if name not in ("config", "help")])
        given = {known[name].name: as_argument(known[name], value) for name, value in values.items()}
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    ctx.default_map = {name: value for name, value in given.items() if value is not None}
    return path


def names_of(option: Any) -> list[str]:
    """What an option or argument is called in a file: as on the command line."""
    names = [name.removeprefix("--").replace("-", "_") for name in option.opts if name.startswith("--")]
    return names or [option.name]


def takes_pairs(option: Any) -> bool:
    """Whether it is given as NAME=VALUE, several times."""
    return option.multiple and "=" in str(option.metavar)


def as_argument(option: Any, value: Any) -> Any:
    """A value from a file as the command line would give it: text, or a list of texts.

    Raises ValueError for a list or a mapping that this option does not take.
    """
    if value is None or isinstance(value, bool):
        return value if value is None or getattr(option, "is_flag", False) else yaml_scalar(value)
    items = [f"{name}={yaml_scalar(item)}" for name, item in value.items()] if isinstance(value, dict) else value
    many = option.multiple
    if isinstance(value, dict) and not takes_pairs(option):
        raise ValueError(f"{names_of(option)[0]} is a mapping; it must be {'a list' if many else 'one value'}")
    if isinstance(items, list):
        if not many or any(isinstance(item, (list, dict)) or item is None for item in items):
            raise ValueError(
                f"{names_of(option)[0]} is {value!r}; it must be {'a list of values' if many else 'one value'}"
            )
        return [item if isinstance(item, str) else yaml_scalar(item) for item in items]
    text = value if isinstance(value, str) else yaml_scalar(value)
    return [text] if many else text


def yaml_scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def parse_options(pairs: list[str] | None, name: str = "--option") -> dict[str, Any]:
    """NAME=VALUE pairs as keyword arguments, each value read as YAML (`steps=60`, `polish=true`, `tau=[1, 0.05]`)."""
    return parse_pairs(pairs or [], name)


def name_or_pairs(given: list[str] | None, name: str = "--option") -> dict[str, Any] | str | None:
    """What is given for an option that takes one name or NAME=VALUE pairs; None for nothing."""
    return given[0] if given and len(given) == 1 and "=" not in given[0] else parse_options(given, name) or None


def resolved(ctx: typer.Context) -> dict[str, Any]:
    """Every option of this run by its name in a file, whichever source it came from, as YAML can hold it."""
    options = {option.name: option for option in ctx.command.params}
    return {
        names_of(options[name])[0]: (name_or_pairs(value) or {}) if takes_pairs(options[name]) else plain(value)
        for name, value in ctx.params.items()
        if name not in NOT_CONFIGURATION
    }


def plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@contextmanager
def result_folder(ctx: typer.Context, out: Path, force: bool) -> Iterator[Path]:
    """`output_folder` with the resolved options of this command."""
    name = name_of(ctx)
    command = name if name == "e3 run" else f"{name} --config"
    with output_folder(out, resolved(ctx), force=force, command=command) as folder:
        yield folder


def check_device(name: str) -> str:
    """Raises `typer.BadParameter` for a device that is none, or that cannot be used here."""
    try:
        usable_device(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return name
