"""A comparison as data: methods × numbers of removed layers × seeds × recoveries, as cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from e3pruner.evaluation.target import check_target
from e3pruner.mask_search.search import find_method
from e3pruner.pipelines.settings import check_keys, check_recover, read_yaml
from e3pruner.precision import PRECISIONS
from e3pruner.vocabulary import check_choice, check_integer, check_options

NO_RECOVERY, COMPENSATE = "none", "compensate"


@dataclass(frozen=True)
class Contestant:
    """A search method with its options; `name` is what the table calls it."""

    name: str
    method: str
    search: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: Any) -> Contestant:
        """From a method's name, or a mapping of `method` and, where wanted, `name` and `search`."""
        values: Any = {"method": entry} if isinstance(entry, str) else entry
        _check_entry("methods", values, ("name", "method", "search"))
        if not isinstance(values.get("method"), str):
            raise ValueError(f"methods: {entry!r} names no method")
        made = cls(str(values.get("name", values["method"])), values["method"], values.get("search") or {})
        find_method(made.method, _mapping("search", made.search))
        return made


@dataclass(frozen=True)
class Recovery:
    """What heals the cut model; `recover` are options of `e3pruner.distill`, None: no training."""

    name: str
    compensates: bool = False
    recover: dict[str, Any] | None = None

    @property
    def heals(self) -> bool:
        """Whether it changes the cut model at all."""
        return self.compensates or self.recover is not None

    @classmethod
    def of(cls, entry: Any) -> Recovery:
        """From "none", "compensate" or a mapping of `recover` and, where wanted, `compensate: true` and `name`."""
        if isinstance(entry, str):
            check_choice("recoveries", entry, (NO_RECOVERY, COMPENSATE))
            return cls(entry, compensates=entry == COMPENSATE)
        _check_entry("recoveries", entry, ("name", "compensate", "recover"))
        recover, compensates = entry.get("recover"), entry.get("compensate", False)
        if not isinstance(compensates, bool):
            raise ValueError(f"recoveries: compensate={compensates!r} must be true or false")
        if recover is None and not compensates:
            raise ValueError(f"recoveries: {entry} does nothing; give recover or compensate, or write {NO_RECOVERY!r}")
        if recover is not None:
            check_recover(_mapping("recover", recover))
        return cls(str(entry.get("name", COMPENSATE if recover is None else "recover")), compensates, recover)


@dataclass(frozen=True)
class Cell:
    """One search, and what is done to its model."""

    contestant: Contestant
    drop: int
    seed: int
    recovery: Recovery
    left_out: str = ""  # the kind of text that it is judged on and sees nothing of, if one kind is left out at a time


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A comparison. Names are those of `PipelineOptions`, where it has them.

    methods: `Contestant`s, or what `Contestant.of` takes. drop: numbers of layers to remove, or fraction: shares of the
    model's layers. seeds: each draws the calibration sequences, the same for every method. recoveries: `Recovery`s, or
    what `Recovery.of` takes. text: kinds (see `e3pruner.text.sources`), or files. unseen: further ones that every cell
    is judged on and none sees; leave_one_out: each kind of `text` is left out once, and is what is judged then, so that
    all figures are of kinds that no step saw. sequences: of a search, over all kinds of text; held_out: of each kind.
    writing: prompts that the first seed's models write from, to count loops and right answers; 0: none.

    Raises ValueError or TypeError naming what is wrong.
    """

    methods: list[Any]
    seeds: list[int]
    drop: list[int] = field(default_factory=list)
    fraction: list[float] = field(default_factory=list)
    recoveries: list[Any] = field(default_factory=lambda: [NO_RECOVERY])
    model: str = "smollm2"
    text: list[str] = field(default_factory=lambda: ["manual", "code"])
    unseen: list[str] = field(default_factory=list)
    leave_one_out: bool = False
    sequences: int = 16
    held_out: int = 32
    length: int = 256
    writing: int = 8
    protect: list[int] = field(default_factory=list)
    precision: str = "auto"
    title: str = ""

    def __post_init__(self) -> None:
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        check_options("a comparison", given, type(self))
        if missing := [name for name in ("methods", "seeds", "recoveries") if not given[name]]:
            raise ValueError(f"a comparison lacks {', '.join(missing)}")
        if bool(self.drop) == bool(self.fraction):
            raise ValueError(f"drop={self.drop} and fraction={self.fraction}: give one, as a list")
        object.__setattr__(self, "methods", _parsed(self.methods, Contestant))
        object.__setattr__(self, "recoveries", _parsed(self.recoveries, Recovery))
        for name in ("sequences", "held_out"):
            check_integer(name, getattr(self, name), 1)
        check_integer("length", self.length, 2)
        check_integer("writing", self.writing, 0)
        for seed in self.seeds:
            check_integer("seeds", seed, 0)
        for target in ("drop", "fraction"):
            for value in getattr(self, target):
                check_target(**{target: value})
        for name in ("methods", "recoveries"):
            called = [entry.name for entry in getattr(self, name)]
            if len(set(called)) != len(called):
                raise ValueError(f"{name} holds a name twice: {called}; tell them apart by `name`")
        if self.leave_one_out and (self.unseen or len(self.text) < 2):
            raise ValueError(
                f"leave_one_out judges on each kind of text={self.text} in turn: name two or more, and no unseen ones"
            )
        if len(self.text) - self.leave_one_out < 2 and any(recovery.compensates for recovery in self.recoveries):
            raise ValueError(
                f"recoveries: {COMPENSATE!r} is fitted to some kinds of text and judged on the last; "
                f"text={self.text} must name two or more, beside one that is left out"
            )
        check_choice("precision", self.precision, PRECISIONS)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """The comparison that a YAML file describes. Raises ValueError naming the file and what is wrong with it."""
        values = read_yaml(path)
        check_keys(str(path), values, [entry.name for entry in fields(cls)])
        if missing := [name for name in ("methods", "seeds") if not values.get(name)]:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        try:
            return cls(**{name: value for name, value in values.items() if value is not None})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def cells(self) -> Iterator[Cell]:
        """Seed by seed, from few removed layers to many, so that what they share is measured once."""
        for left_out in self.text if self.leave_one_out else [""]:
            for seed in self.seeds:
                for drop in self.drop:
                    for contestant in self.methods:
                        for recovery in self.recoveries:
                            yield Cell(contestant, drop, seed, recovery, left_out)

    def settings(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return asdict(self)


def _parsed(entries: list[Any], kind: Any) -> list[Any]:
    return [entry if isinstance(entry, kind) else kind.of(entry) for entry in entries]


def _check_entry(where: str, entry: Any, known: tuple[str, ...]) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {entry!r} must be a name or a mapping with {', '.join(known)}")
    check_keys(f"{where}: {entry}", entry, list(known))


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}={value!r} must be a mapping of option names to values")
    return value
