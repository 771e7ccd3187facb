"""How many layers must go for a model to become as small or as fast as it shall be."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedModel

from e3pruner.evaluation.latency import latency
from e3pruner.models import find_layers
from e3pruner.models.stack import check_indices
from e3pruner.surgery import prune


def layers_to_drop(
    model: PreTrainedModel,
    *,
    fraction: float | None = None,
    parameters: float | None = None,
    milliseconds: float | None = None,
    protect: Sequence[int] = (),
) -> int:
    """The least number of layers of `model` to remove for exactly one target.

    fraction: of the layers, rounded to the nearest number, at least one. parameters: that the pruned model has at most,
    tied ones counted once, whichever unprotected layers go. milliseconds: that a decoded token takes at most, measured
    now on this machine by `latency`: a straight line through the dense model and one of half its layers gives a first
    number, from which the least one that is measured to be fast enough is searched.

    Raises `ValueError` unless one target is given, and for one that cannot be reached or needs no layer removed.
    """
    given = {"fraction": fraction, "parameters": parameters, "milliseconds": milliseconds}
    ((name, value),) = _only(given)
    protected = check_indices("protect", protect, len(find_layers(model)))
    most = min(len(find_layers(model)) - 1, len(find_layers(model)) - len(protected))
    if name == "fraction":
        if not 0 < value < 1:
            raise ValueError(f"fraction={value} must be between 0 and 1")
        drop = max(1, round(value * len(find_layers(model))))
    elif name == "parameters":
        drop = _for_parameters(model, value, protected)
    else:
        drop = _for_milliseconds(model, value, most)
    if drop > most:
        raise ValueError(f"{name}={value:g} needs more than the {most} layers that may go")
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
    if not 0 < most < math.inf:
        raise ValueError(f"milliseconds={most} must be finite and above 0")
    count = len(find_layers(model))
    half = count // 2
    dense, halved = _milliseconds(model, 0), _milliseconds(model, count - half)
    if dense <= most:
        raise ValueError(f"milliseconds={most:g}: a token takes {dense:.3g} already; nothing needs to go")
    per_layer = (dense - halved) / (count - half)
    drop = min(limit, max(1, math.ceil((dense - most) / per_layer))) if per_layer > 0 else limit
    if _milliseconds(model, drop) <= most:
        while drop > 1 and _milliseconds(model, drop - 1) <= most:
            drop -= 1
        return drop
    while drop < limit and _milliseconds(model, drop + 1) > most:
        drop += 1
    return drop + 1


def _milliseconds(model: PreTrainedModel, drop: int) -> float:
    """Of a decoded token without `drop` layers: the last ones, any others would take as long."""
    kept = list(range(len(find_layers(model)) - drop))
    pruned = prune(model, kept, copy_weights=False) if drop else model
    return 1000 / latency(pruned)["decode_tokens_per_s"]
