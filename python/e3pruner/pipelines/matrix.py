"""The YAML of a comparison: methods × numbers of removed layers × seeds × recoveries, as cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from e3pruner.mask_search.checks import check_choice, check_integer
from e3pruner.mask_search.search import find_method
from e3pruner.precision import PRECISIONS
from e3pruner.recovery import DistillOptions

NO_RECOVERY, COMPENSATE = "none", "compensate"


@dataclass(frozen=True)
class Contestant:
    """A search method with options; `name` is what the table calls it."""

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recovery:
    """What heals the cut model; `options` are those of `e3pruner.distill`, None: no training."""

    name: str
    compensates: bool = False
    options: dict[str, Any] | None = None

    @property
    def heals(self) -> bool:
        """Whether it changes the cut model at all."""
        return self.compensates or self.options is not None


@dataclass(frozen=True)
class Cell:
    """One search, and what is done to its model."""

    contestant: Contestant
    drop: int
    seed: int
    recovery: Recovery


@dataclass(frozen=True)
class Matrix:
    """A comparison. calibration: sequences of a search, over all kinds of `text`; held_out: sequences of each kind."""

    methods: list[Contestant]
    drop: list[int]
    seeds: list[int]
    recoveries: list[Recovery]
    model: str = "smollm2"
    text: list[str] = field(default_factory=lambda: ["manual", "code"])
    calibration: int = 16
    held_out: int = 32
    length: int = 256
    protect: list[int] = field(default_factory=list)
    precision: str = "auto"
    title: str = ""

    def cells(self) -> Iterator[Cell]:
        """Seed by seed, from few removed layers to many, so that what they share is measured once."""
        for seed in self.seeds:
            for drop in self.drop:
                for contestant in self.methods:
                    for recovery in self.recoveries:
                        yield Cell(contestant, drop, seed, recovery)

    def settings(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return asdict(self)


def load_matrix(path: Path) -> Matrix:
    """The comparison that a YAML file describes.

    `methods` are names, or mappings of `method` and, where wanted, `name` and `options`; `recoveries` are "none",
    "compensate" or mappings of `distill`, the options, and `compensate: true`. Raises `ValueError` or `TypeError`
    naming the file and what is wrong with it.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    names = [entry.name for entry in fields(Matrix)]
    if not isinstance(values, dict) or set(values) - set(names):
        raise ValueError(f"{path} must be a mapping with keys among {', '.join(names)}")
    if missing := [name for name in ("methods", "drop", "seeds") if not values.get(name)]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    try:
        parsed = values | {
            "methods": [_contestant(entry) for entry in values["methods"]],
            "recoveries": [_recovery(entry) for entry in values.get("recoveries", [NO_RECOVERY])],
        }
        matrix = Matrix(**parsed)
        _check(matrix)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error
    return matrix


def _contestant(entry: Any) -> Contestant:
    values = {"method": entry} if isinstance(entry, str) else dict(entry)
    made = Contestant(**({"name": values.get("method", "")} | values))
    find_method(made.method, made.options)
    return made


def _recovery(entry: Any) -> Recovery:
    if isinstance(entry, str):
        check_choice("recoveries", entry, (NO_RECOVERY, COMPENSATE))
        return Recovery(entry, compensates=entry == COMPENSATE)
    values = dict(entry)
    if unknown := set(values) - {"name", "compensate", "distill"}:
        raise ValueError(f"recoveries: {sorted(unknown)} should be among name, compensate, distill")
    options, compensates = values.get("distill"), bool(values.get("compensate", False))
    if options is None and not compensates:
        raise ValueError(f"recoveries: {entry} does nothing; give distill or compensate, or write {NO_RECOVERY!r}")
    if options is not None:
        DistillOptions(**options)
    name = values.get("name", COMPENSATE if options is None else "distill")
    return Recovery(name, compensates, options)


def _check(matrix: Matrix) -> None:
    for name in ("calibration", "held_out"):
        check_integer(name, getattr(matrix, name), 1)
    check_integer("length", matrix.length, 2)
    for name in ("drop", "seeds"):
        for value in getattr(matrix, name):
            check_integer(name, value, 0 if name == "seeds" else 1)
    for name, labels in (("methods", matrix.methods), ("recoveries", matrix.recoveries)):
        called = [entry.name for entry in labels]
        if len(set(called)) != len(called):
            raise ValueError(f"{name} holds a name twice: {called}; tell them apart by `name`")
    if len(matrix.text) < 2 and any(recovery.compensates for recovery in matrix.recoveries):
        raise ValueError(
            f"recoveries: {COMPENSATE!r} is fitted to some kinds of text and judged on the last; "
            f"text={matrix.text} must name two or more"
        )
    check_choice("precision", matrix.precision, PRECISIONS)
