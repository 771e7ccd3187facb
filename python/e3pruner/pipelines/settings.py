"""Settings from YAML, and their checks: the same for Python, files and the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from e3pruner.evaluation import layers_to_drop
from e3pruner.mask_search import METHODS
from e3pruner.mask_search.checks import check_integer
from e3pruner.mask_search.search import find_method
from e3pruner.recovery import DistillOptions
from e3pruner.recovery.compensation import METHODS as COMPENSATIONS
from e3pruner.recovery.tracking import check_tracker
from e3pruner.vocabulary import check_options, did_you_mean

DEFAULT_DROP = 8
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


def check_named(name: str, value: str, known: Iterable[str]) -> None:
    """Raises ValueError unless `value`, given as --`name`, is one of `known`."""
    if value not in known:
        raise ValueError(f"--{name} {value} must be one of {', '.join(known)}{did_you_mean(value, known)}")


def check_search(method: str, search: Mapping[str, Any], name: str = "method") -> None:
    """Raises ValueError or TypeError unless there is such a search method with such options."""
    check_named(name, method, METHODS)
    find_method(method, search)


def check_recover(recover: Mapping[str, Any], track: str | None = None) -> None:
    """Raises ValueError, TypeError or ModuleNotFoundError naming the option of a recovery that is wrong."""
    check_options("recover", recover, DistillOptions)
    DistillOptions(**recover)
    check_tracker(track)


def check_compensate(compensate: str, judge: Any) -> None:
    """Raises ValueError for an unknown method, and unless "auto", and it alone, has a text to judge on."""
    check_named("compensate", compensate, ("auto", *COMPENSATIONS))
    if (compensate == "auto") != (judge is not None):
        raise ValueError("--compensate auto needs --judge, text of another kind than --text; and nothing else takes it")


def check_target(**targets: float | None) -> None:
    """Raises ValueError where more than one target of a search is given, or one that is none."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) > 1:
        (name, value), *others = given.items()
        raise ValueError(
            f"--{name} {value:g} is one target, {', '.join(f'--{n} {v:g}' for n, v in others)} another; give one"
        )
    for name, value in given.items():
        if name == "drop":
            check_integer(name, value, 1)  # type: ignore[arg-type]
        elif not 0 < value < (1 if name == "fraction" else float("inf")):
            legal = "between 0 and 1" if name == "fraction" else "finite and above 0"
            raise ValueError(f"{name}={value} must be {legal}")


def number_to_drop(
    model: PreTrainedModel, protect: Sequence[int], quota: Mapping[str, int] | None = None, **targets: float | None
) -> int:
    """The number of layers that the one target given comes to; without any, all of `quota`, or 8.

    Raises what `layers_to_drop` raises.
    """
    given = {name: value for name, value in targets.items() if value is not None}
    if "drop" in given:
        return int(given["drop"])
    if not given:
        return sum(quota.values()) if quota else DEFAULT_DROP
    return layers_to_drop(model, protect=protect, **given)
