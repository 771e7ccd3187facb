"""What a search may remove one by one: the layers of a model, or their attentions and MLPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from e3pruner.evaluation.target import check_drop
from e3pruner.models import find_layers
from e3pruner.models.sublayers import KINDS, writer
from e3pruner.vocabulary import check_choice

GRANULARITIES = ("layer", "sublayer")


@dataclass(frozen=True)
class Units:
    """Unit l is layer l; where a layer is two units, its attention is 2l and its MLP 2l + 1.

    count: of the model. free: units that may go. groups: free units that share a number of them to remove, and that
    number; together they hold all free units.
    """

    count: int
    units_per_layer: int
    free: list[int]
    groups: list[tuple[list[int], int]]

    def removed(self, units: Sequence[int]) -> tuple[list[int], dict[str, list[int]]]:
        """Units to remove, as whole layers and as sub-layers of the others."""
        gone = set(units)
        if self.units_per_layer == 1:
            return sorted(gone), {kind: [] for kind in KINDS}
        whole = [unit // 2 for unit in gone if unit % 2 == 0 and unit + 1 in gone]
        parts = {
            kind: sorted(unit // 2 for unit in gone if unit % 2 == place and unit // 2 not in whole)
            for place, kind in enumerate(KINDS)
        }
        return sorted(whole), parts


def units_of(
    model: PreTrainedModel,
    drop: int,
    protect: Sequence[int] = (),
    granularity: str = "layer",
    quota: Mapping[str, int] | None = None,
) -> Units:
    """The units of `model` of which `drop` shall go.

    protect: layers that stay whole. granularity: "layer" or "sublayer". quota: how many units go of each kind, kinds
    being the configuration's `layer_types` (such as "sliding_attention"), or "attention" and "mlp" of sub-layers; a
    kind that is not named loses none.

    Raises `ValueError` or `TypeError` naming the argument that does not fit.
    """
    check_choice("granularity", granularity, GRANULARITIES)
    layers = find_layers(model)
    size = 1 + GRANULARITIES.index(granularity)
    check_drop(drop, size * len(layers), size * len(protect))
    if size == 2:
        for layer in layers:
            for kind in KINDS:
                writer(layer, kind)  # raises for a layer whose sub-layers cannot be told apart
    free = [unit for unit in range(size * len(layers)) if unit // size not in set(protect)]
    groups = [(free, drop)]
    if quota is not None:
        kinds = list(KINDS) * len(layers) if size == 2 else _layer_types(model, len(layers))
        groups = _by_quota(free, kinds, drop, quota)
    return Units(size * len(layers), size, free, groups)


def _layer_types(model: PreTrainedModel, count: int) -> list[str]:
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    if not kinds or len(kinds) != count:
        raise ValueError(f"quota: a {model.config.model_type} model has no layer_types to tell its layers apart by")
    return list(kinds)


def _by_quota(free: list[int], kinds: list[str], drop: int, quota: Mapping[str, int]) -> list[tuple[list[int], int]]:
    if unknown := sorted(set(quota) - set(kinds)):
        raise ValueError(f"quota names {', '.join(unknown)}; the kinds are {', '.join(sorted(set(kinds)))}")
    if sum(quota.values()) != drop:
        raise ValueError(f"quota={dict(quota)} removes {sum(quota.values())}, drop={drop}; they must agree")
    groups = []
    for kind in dict.fromkeys(kinds):
        members, count = [unit for unit in free if kinds[unit] == kind], quota.get(kind, 0)
        if not 0 <= count <= len(members):
            raise ValueError(f"quota of {kind} is {count}; {len(members)} of that kind may go")
        groups.append((members, count))
    return groups
