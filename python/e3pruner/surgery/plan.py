"""The result of a search: which decoder layers stay, how that was decided, and the file that keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from e3pruner.models.stack import check_indices
from e3pruner.models.sublayers import KINDS, check_sublayers
from e3pruner.storage import parse_json, write_json

PLAN_FILE = "pruning.json"
_FORMAT = "e3pruner.PruningPlan"
_KINDS = {
    "kept": list,
    "removed": list,
    "method": str,
    "seed": int,
    "model_type": str,
    "history": list,
    "metrics": dict,
    "sublayers": dict,
}


@dataclass(frozen=True)
class PruningPlan:
    """Decoder layers to keep and to remove, by their index in the dense model, both ascending.

    kept, removed: disjoint, together 0 … num_layers − 1, `kept` not empty.
    method, seed: the search method and the seed that found it.
    model_type: `config.model_type` of the model it was found for; empty if it is for any.
    history: one record per step of the search, oldest first.
    metrics: figures measured for the final mask.
    sublayers: kept layers that lose their "attention" or their "mlp" (a layer that loses both is one of `removed`).

    Raises `ValueError` naming the field that does not fit.
    """

    kept: list[int]
    removed: list[int]
    method: str = ""
    seed: int = 0
    model_type: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    sublayers: dict[str, list[int]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name} must be a {kind.__name__}, not {value!r}")
        for number, record in enumerate(self.history):
            if not isinstance(record, dict):
                raise ValueError(f"history[{number}] must be a dict, not {record!r}")
        object.__setattr__(self, "kept", check_indices("kept", self.kept, self.num_layers))
        object.__setattr__(self, "removed", check_indices("removed", self.removed, self.num_layers))
        if not self.kept:
            raise ValueError("kept=[] keeps no layer; at least one must stay")
        if both := sorted(set(self.kept) & set(self.removed)):
            raise ValueError(f"kept and removed both hold the layers {both}")
        object.__setattr__(self, "sublayers", check_sublayers("sublayers", self.sublayers, self.num_layers))
        attention, mlp = (set(self.sublayers[kind]) for kind in KINDS)
        if gone := sorted((attention | mlp) & set(self.removed) | attention & mlp):
            raise ValueError(f"sublayers names the layers {gone}, of which nothing is kept; they belong to removed")

    @classmethod
    def of_removed(cls, removed: Iterable[int], num_layers: int, **values: Any) -> PruningPlan:
        """The plan that removes `removed` of `num_layers` layers; `values` are the other fields."""
        removed = check_indices("removed", removed, num_layers)
        return cls(sorted(set(range(num_layers)) - set(removed)), removed, **values)

    @property
    def keep(self) -> list[int] | dict[str, list[int]]:
        """What `LayerSkipRuntime` takes as `keep`: the kept layers, or those of each kind of sub-layer."""
        if not any(self.sublayers.values()):
            return self.kept
        return {kind: [layer for layer in self.kept if layer not in self.sublayers[kind]] for kind in KINDS}

    @property
    def num_layers(self) -> int:
        """Layers of the dense model."""
        return len(self.kept) + len(self.removed)

    def save(self, path: str | Path, checkpoint: Mapping[str, Any] | None = None) -> None:
        """Write the plan to `path` as JSON, whole or not at all; `checkpoint`: what is known of the files beside it."""
        about = {} if checkpoint is None else {"checkpoint": checkpoint}
        write_json(path, {"format": _FORMAT, "num_layers": self.num_layers, **asdict(self), **about})

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """The plan that `save` wrote to `path`. Raises `ValueError` naming the file and what is wrong with it."""
        try:
            values = parse_json(Path(path).read_text(encoding="utf-8"))
            if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
                raise ValueError(f'it has no "format": "{_FORMAT}"')
            num_layers = values.pop("num_layers", None)
            values.pop("checkpoint", None)
            names = {entry.name for entry in fields(cls)}
            if values.keys() not in (names, names - {"sublayers"}):  # older plans remove whole layers only
                raise ValueError(f"its fields {sorted(values)} should be {sorted(names)}")
            plan = cls(**values)
            if plan.num_layers != num_layers:
                raise ValueError(f"num_layers is {num_layers}, kept and removed hold {plan.num_layers} layers")
        except ValueError as error:
            raise ValueError(f"{path} is not a pruning plan: {error}") from error
        return plan
