"""What a search may remove one by one: the layers of a model, or their attentions and MLPs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations

from transformers import PreTrainedModel

from e3pruner.evaluation.target import check_drop
from e3pruner.models import find_layers
from e3pruner.models.sublayers import KINDS, writer
from e3pruner.surgery.demands import Demand, Limit, Order, demands_of
from e3pruner.surgery.engines import orders_of
from e3pruner.vocabulary import check_choice

GRANULARITIES = ("layer", "sublayer")


@dataclass(frozen=True)
class Units:
    """Unit l is layer l; where a layer is two units, its attention is 2l and its MLP 2l + 1.

    count: of the model. free: units that may go. groups: free units that share a number of them to remove, and that
    number; together they hold all free units. demands: of the configuration on the layers that stay.
    """

    count: int
    units_per_layer: int
    free: list[int]
    groups: list[tuple[list[int], int]]
    demands: list[Demand] = field(default_factory=list)

    def fits(self, removed: Collection[int]) -> bool:
        """Whether the units `removed` may go together."""
        gone = set(self.removed(removed)[0])
        kept = [layer for layer in range(self.count // self.units_per_layer) if layer not in gone]
        return bool(kept) and not any(demand.broken_by(kept) for demand in self.demands)

    def may_go(self, removed: Collection[int]) -> bool:
        """Whether `removed` may go together and holds as many units of each group as shall go."""
        gone = set(removed)
        return all(len(gone & set(members)) == count for members, count in self.groups) and self.fits(removed)

    def cheapest(
        self, values: Sequence[float], *, gone: Collection[int] = (), like: Collection[int] = ()
    ) -> list[int] | None:
        """Of the sets of units that may go, as many of each group as it says, the one whose `values`, one per unit,
        add up to the least; of equal ones the deeper. None if there is none.

        Only sets that hold `gone` count, and of these those that have most units of `like`.
        """
        if not self.demands and not gone and not like:
            picked = [sorted(members, key=lambda unit: (values[unit], -unit))[:count] for members, count in self.groups]
            return sorted(chain.from_iterable(picked))
        return _cheapest(self, values, set(gone), set(like))

    def removed(self, units: Collection[int]) -> tuple[list[int], dict[str, list[int]]]:
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
    quota: Mapping[str, int] | str | None = None,
) -> Units:
    """The units of `model` of which `drop` shall go.

    protect: layers that stay whole. granularity: "layer" or "sublayer". quota: how many units go of each kind, kinds
    being the configuration's `layer_types` (such as "sliding_attention"), or "attention" and "mlp" of sub-layers; a
    kind that is not named loses none. Or the name of an engine whose rule the layers that stay must keep to.

    Raises `ValueError` or `TypeError` naming the argument that does not fit, or the demand of the configuration that
    leaves no such plan.
    """
    check_choice("granularity", granularity, GRANULARITIES)
    layers = find_layers(model)
    size = 1 + GRANULARITIES.index(granularity)
    check_drop(drop, size * len(layers), size * len(protect))
    if size == 2:
        for layer in layers:
            for kind in KINDS:
                writer(layer, kind)  # raises for a layer whose sub-layers cannot be told apart
    demands = demands_of(model.config)
    if isinstance(quota, str):
        demands, quota = [*demands, *orders_of(model.config, quota)], None
    fixed = set(protect) | ({layer for each in demands for layer in each.fixed} if size == 1 else set())
    free = [unit for unit in range(size * len(layers)) if unit // size not in fixed]
    groups = [(free, drop)]
    if quota is not None:
        kinds = list(KINDS) * len(layers) if size == 2 else _layer_types(model, len(layers))
        groups = _by_quota(free, kinds, drop, quota)
    units = Units(size * len(layers), size, free, groups, demands)
    if demands and units.cheapest([0.0] * units.count) is None:
        reasons = "; ".join(dict.fromkeys(demand.reason for demand in demands))
        raise ValueError(f"drop={drop} has no plan that this model ({model.config.model_type}) allows: {reasons}")
    return units


# Units gone of each group, layers gone of each limit, layers kept of each order's, and whether any are kept.
State = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]
Cost = tuple[int, float, int]  # units of `like` that stay, the sum of the values, minus the sum of the units


def _cheapest(units: Units, values: Sequence[float], gone: set[int], like: set[int]) -> list[int] | None:
    """`Units.cheapest` by dynamic programming over the layers, from the first to the last."""
    group_of = {unit: number for number, (members, _) in enumerate(units.groups) for unit in members}
    limits = [demand for demand in units.demands if isinstance(demand, Limit)]
    orders = [demand for demand in units.demands if isinstance(demand, Order)]
    start: State = (tuple(0 for _ in units.groups), tuple(0 for _ in limits), tuple(0 for _ in orders), False)
    best: dict[State, tuple[Cost, tuple[int, ...]]] = {start: ((0, 0.0, 0), ())}
    for layer in range(units.count // units.units_per_layer):
        after: dict[State, tuple[Cost, tuple[int, ...]]] = {}
        for choice in _choices(units, layer, group_of, gone):
            goes = len(choice) == units.units_per_layer
            for (counts, spent, placed, kept), (cost, removed) in best.items():
                taking = [not goes and order.counts(layer) for order in orders]
                if any(
                    takes and order.kinds[layer] != order.rule[place]
                    for takes, order, place in zip(taking, orders, placed, strict=True)
                ):
                    continue
                added = [group_of[unit] for unit in choice]
                counted = tuple(count + added.count(number) for number, count in enumerate(counts))
                used = tuple(n + (goes and layer in each.members) for n, each in zip(spent, limits, strict=True))
                if any(n > each.most for n, each in zip(used, limits, strict=True)) or any(
                    count > most for count, (_, most) in zip(counted, units.groups, strict=True)
                ):
                    continue
                missed = cost[0] - len(like.intersection(choice))
                total = (missed, cost[1] + sum(values[unit] for unit in choice), cost[2] - sum(choice))
                following = tuple(place + takes for place, takes in zip(placed, taking, strict=True))
                state = counted, used, following, kept or not goes
                if state not in after or total < after[state][0]:
                    after[state] = total, (*removed, *choice)
        best = after
    full = tuple(count for _, count in units.groups)
    ends = [found for (counts, _, _, kept), found in best.items() if counts == full and kept]
    return list(min(ends)[1]) if ends else None


def _choices(units: Units, layer: int, group_of: Mapping[int, int], gone: set[int]) -> Iterator[tuple[int, ...]]:
    """The sets of units of one layer that may go, those in `gone` among them."""
    own = range(layer * units.units_per_layer, (layer + 1) * units.units_per_layer)
    needed = gone.intersection(own)
    for size in range(len(own) + 1):
        for choice in combinations([unit for unit in own if unit in group_of], size):
            if needed <= set(choice):
                yield choice


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
