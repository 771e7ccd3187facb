"""How many layers must go for a model to become as small or as fast as it shall be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

from transformers import PreTrainedModel

from e3pruner.evaluation.latency import speeds
from e3pruner.models import find_layers
from e3pruner.models.stack import check_indices
from e3pruner.surgery import prune
from e3pruner.vocabulary import check_integer

DEFAULT_DROP = 8


def check_target(**targets: float | None) -> None:
    """Raises `ValueError` where more than one target of a search is given, or one that cannot be met."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) > 1:
        (name, value), *others = given.items()
        raise ValueError(
            f"{name}={value:g} is one target, {', '.join(f'{n}={v:g}' for n, v in others)} another; give one"
        )
    for name, value in given.items():
        if name == "drop":
            check_integer(name, cast(int, value), 1)
        elif not 0 < value < (1 if name == "fraction" else math.inf):
            legal = "between 0 and 1" if name == "fraction" else "finite and above 0"
            raise ValueError(f"{name}={value} must be {legal}")


def check_drop(drop: int, num_layers: int, num_protected: int = 0) -> None:
    """Raises `TypeError` or `ValueError` unless `drop` of the layers can go, one stays, and the protected ones do."""
    if isinstance(drop, bool) or not isinstance(drop, int):
        raise TypeError(f"drop must be an integer, not {drop!r}")
    if not 1 <= drop < num_layers:
        raise ValueError(f"drop={drop} must be from 1 to {num_layers - 1}: the model has {num_layers} layers")
    if drop > num_layers - num_protected:
        raise ValueError(f"protect names {num_protected} layers, drop={drop} leaves only {num_layers - drop}")


def number_to_drop(
    model: PreTrainedModel,
    protect: Sequence[int] = (),
    *,
    quota: Mapping[str, int] | None = None,
    sublayers: bool = False,
    **targets: float | None,
) -> int:
    """The number of layers that the one target given comes to: `drop`, or one of `layers_to_drop`; without any, all of
    `quota`, or 8. With `sublayers` it counts attentions and MLPs one by one.

    Raises what `check_target` and `layers_to_drop` raise.
    """
    given = {name: value for name, value in targets.items() if value is not None}
    if list(given) == ["drop"]:
        return cast(int, given["drop"])  # which `check_drop` checks, who knows how many layers there are
    check_target(**given)
    if given:
        return layers_to_drop(model, protect=protect, sublayers=sublayers, **given)
    return sum(quota.values()) if quota else DEFAULT_DROP


def layers_to_drop(
    model: PreTrainedModel,
    *,
    fraction: float | None = None,
    parameters: float | None = None,
    milliseconds: float | None = None,
    protect: Sequence[int] = (),
    sublayers: bool = False,
) -> int:
    """The least number of layers of `model` to remove for exactly one target.

    fraction: of the layers, rounded to the nearest number, at least one. parameters: that the pruned model has at most,
    tied ones counted once, whichever unprotected layers go. milliseconds: that a decoded token takes at most, measured
    now on this machine by `speeds`: a straight line through the dense model and one of half its layers gives a first
    number, from which the least one that is measured to be fast enough is searched. sublayers: count attentions and
    MLPs one by one; of them only a fraction is known beforehand.

    Raises `ValueError` unless one target is given, and for one that cannot be reached or needs no layer removed.
    """
    given = {"fraction": fraction, "parameters": parameters, "milliseconds": milliseconds}
    ((name, value),) = _only(given)
    check_target(**{name: value})
    layers, size = len(find_layers(model)), 1 + sublayers
    protected = check_indices("protect", protect, layers)
    most = min(size * layers - 1, size * (layers - len(protected)))
    if name == "fraction":
        drop = max(1, round(value * size * layers))
    elif sublayers:
        raise ValueError(f"{name}={value:g} counts whole layers; for sub-layers give drop or fraction")
    elif name == "parameters":
        drop = _for_parameters(model, value, protected)
    else:
        drop = _for_milliseconds(model, value, most)
    kind = "sub-layers" if sublayers else "layers"
    if drop > most:
        raise ValueError(f"{name}={value:g} needs more than the {most} {kind} that may go")
    return drop


def _only(given: dict[str, float | None]) -> list[tuple[str, float]]:
    named = [(name, value) for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"give one target of {', '.join(given)}, not {len(named)}")
    return named


def _for_parameters(model: PreTrainedModel, most: float, protected: Sequence[int]) -> int:
    total = sum(p.numel() for p in model.parameters())
    if total <= most:
        raise ValueError(f"parameters={most:g}: the model has {total:,} already; nothing needs to go")
    layers = find_layers(model)
    sizes = sorted(
        sum(p.numel() for p in layer.parameters()) for index, layer in enumerate(layers) if index not in protected
    )
    for drop, size in enumerate(sizes, start=1):
        total -= size
        if total <= most:
            return drop
    return len(layers)


def _for_milliseconds(model: PreTrainedModel, most: float, limit: int) -> int:
    count = len(find_layers(model))
    half = count // 2
    dense, halved = _milliseconds(model, 0, count - half)
    if dense <= most:
        raise ValueError(f"milliseconds={most:g}: a token takes {dense:.3g} already; nothing needs to go")
    per_layer = (dense - halved) / (count - half)
    drop = min(limit, max(1, math.ceil((dense - most) / per_layer))) if per_layer > 0 else limit
    if _milliseconds(model, drop)[0] <= most:
        while drop > 1 and _milliseconds(model, drop - 1)[0] <= most:
            drop -= 1
        return drop
    while drop < limit and _milliseconds(model, drop + 1)[0] > most:
        drop += 1
    return drop + 1


def _milliseconds(model: PreTrainedModel, *drops: int) -> list[float]:
    """Of a decoded token without each of so many layers: the last ones, any others would take as long."""
    layers = len(find_layers(model))
    cut = {drop: prune(model, list(range(layers - drop)), copy_weights=False) if drop else model for drop in drops}
    found = speeds({str(drop): pruned for drop, pruned in cut.items()})
    rates = [found.of[str(drop)]["decode_tokens_per_s"] for drop in drops]
    if None in rates:
        raise RuntimeError(f"the time of a token cannot be told: {'; '.join(found.timing['doubts'])}")
    return [1000 / rate for rate in rates]
