"""Settings from YAML, and their checks: the same for Python, files and the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from e3pruner.mask_search import METHODS
from e3pruner.mask_search.search import find_method
from e3pruner.recovery import DistillOptions
from e3pruner.recovery.compensation import METHODS as COMPENSATIONS
from e3pruner.recovery.tracking import check_tracker
from e3pruner.requirements import require
from e3pruner.vocabulary import check_choice, check_options, did_you_mean

FILES = "files"  # of a finished result: no setting, but it stands in the same file


class Loader(yaml.SafeLoader):
    """YAML whose numbers may be written as 2e-4, which YAML 1.1 takes for text."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises ValueError that begins with `where`."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{where} cannot be read as YAML: {why}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, by name, `-` in a name being `_`. Raises ValueError naming the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as YAML: it is no UTF-8 text ({error})") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        kind = "nothing" if values is None else type(values).__name__
        raise ValueError(f"{path} must hold one mapping of option names to values, not {kind}")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def read_settings(path: str | Path) -> dict[str, Any]:
    """`read_yaml` without what a finished result adds to its settings."""
    return {name: value for name, value in read_yaml(path).items() if name != FILES}


def check_keys(where: str, values: Mapping[str, Any], known: list[str]) -> None:
    """Raises ValueError naming the keys that are not `known`."""
    if unknown := sorted({str(name) for name in values} - set(known)):
        hint = did_you_mean(unknown[0], known)
        raise ValueError(
            f"{where} has unknown keys: {', '.join(unknown)}{hint}; it may have {', '.join(sorted(known))}"
        )


def parse_pairs(pairs: Sequence[Any], name: str) -> dict[str, Any]:
    """NAME=VALUE pairs as a mapping, each value read as YAML (`steps=60`, `polish=true`, `noise=2e-1`).

    Raises ValueError, saying what `name` must be, for another text.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = str(pair).partition("=")
        if not (equals and key.isidentifier()):
            raise ValueError(f"{name} must be NAME=VALUE, got {pair!r}")
        options[key] = parse_yaml(value, f"{name} {pair}")
    return options


def check_search(method: str, search: Mapping[str, Any], name: str = "method") -> None:
    """Raises ValueError or TypeError unless there is such a search method with such options."""
    check_choice(name, method, METHODS)
    find_method(method, search)


def check_recover(recover: Mapping[str, Any], track: str | None = None) -> None:
    """Raises ValueError, TypeError or ModuleNotFoundError naming the option of a recovery that is wrong."""
    check_options("recover", recover, DistillOptions)
    if DistillOptions(**recover).trainable == "lora":
        require("peft")
    check_tracker(track)


def check_compensate(compensate: str, judge: Any) -> None:
    """Raises ValueError for an unknown method, and unless "auto", and it alone, has a text to judge on."""
    check_choice("compensate", compensate, ("auto", *COMPENSATIONS))
    if (compensate == "auto") != (judge is not None):
        raise ValueError("--compensate auto needs --judge, text of another kind than --text; and nothing else takes it")
