"""How many layers? A plan for each of several depths, and what each of them costs and buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import e3pruner
from e3pruner.evaluation import speeds
from e3pruner.evaluation.target import check_target
from e3pruner.mask_search import METHODS
from e3pruner.models import find_layers
from e3pruner.surgery import PruningPlan
from e3pruner.surgery.plan import PLAN_FILE
from e3pruner.text.given import Given
from e3pruner.vocabulary import check_integer, check_positive

_SHARES = (0.125, 0.25, 0.375, 0.5)  # of the layers, where no depths are given


@dataclass(frozen=True)
class Point:
    """A depth: the plan, "layers", "parameters", "decode_tokens_per_s" and "prefill_tokens_per_s" of its model, its
    "kl" and "perplexity" on held-out text, and, where there is text of a kind that the search has not seen,
    "unseen_kl" and "unseen_perplexity". `ratio`: its perplexity over the dense model's, there if it can be.
    """

    plan: PruningPlan
    figures: dict[str, Any]
    ratio: float

    @property
    def drop(self) -> int:
        """How many layers go."""
        return len(self.plan.removed)


def parse_drops(drop: int | str | Sequence[int] | None) -> list[int]:
    """[4, 8, 12] of "4,8,12", [8] of 8; [] of None. Raises ValueError for anything but rising numbers from 1."""
    if drop is None:
        return []
    parts = drop.split(",") if isinstance(drop, str) else [drop] if isinstance(drop, int) else drop
    given = [str(part).strip() for part in parts]
    found = [int(part) for part in given if part.lstrip("+-").isdecimal()]
    if len(found) != len(given) or not found or sorted(set(found)) != found:
        raise ValueError(f"drop={drop} must be a number of layers, or several that rise, such as 4,8,12")
    for number in found:
        check_target(drop=number)
    return found


def usual_drops(model: PreTrainedModel, protect: Sequence[int] = ()) -> list[int]:
    """An eighth, a quarter, three eighths and half of the layers, as far as so many may go."""
    layers = len(find_layers(model))
    return sorted({drop for share in _SHARES if 0 < (drop := round(share * layers)) <= layers - len(protect)})


def frontier(
    model: PreTrainedModel,
    token_batches: Given,
    drops: Sequence[int],
    held_out: Given,
    unseen: Given | None = None,
    *,
    method: str = "gumbel-topk",
    speed: bool = True,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> tuple[dict[str, Any], list[Point]]:
    """The figures of the dense model, with "timing", how far the speeds can be trusted (see
    `e3pruner.evaluation.Speeds`), and a `Point` for each of `drops`, which rise.

    `options` are those of `e3pruner.search`; what one depth has measured, the next need not measure again, and a method
    that can be started somewhere starts from the plan of the depth before. Speeds are measured here and now, unless
    `speed` is False.

    Raises ValueError for drops that do not rise, besides what a search raises.
    """
    if not drops or sorted(set(drops)) != list(drops):
        raise ValueError(f"drops={list(drops)} must be numbers of layers that rise")
    for drop in drops:
        check_integer("drops", drop, 1)
    dense = _figures(model, model, held_out, unseen)
    found: list[Point] = []
    cut: dict[str, PreTrainedModel] = {}
    for drop in drops:
        near: dict[str, Any] = {"warm": [found[-1].plan.removed]} if found and "warm" in METHODS[method].options else {}
        plan = e3pruner.search(model, token_batches, drop, method, checkpoint=checkpoint, **near, **options)
        cut[str(drop)] = e3pruner.prune(model, plan, copy_weights=False)
        figures = _figures(cut[str(drop)], model, held_out, unseen)
        name = "perplexity" if unseen is None else "unseen_perplexity"
        found.append(Point(plan, figures, figures[name] / dense[name]))
    if speed:  # of all depths in turns
        measured = speeds({"dense": model, **cut})
        dense |= measured.of["dense"] | {"timing": measured.timing}
        for point in found:
            point.figures.update(measured.of[str(point.drop)])
    return dense, found


def deepest(points: Sequence[Point], most: float) -> Point:
    """The point with the most layers gone whose perplexity is at most `most` times the dense model's.

    Raises ValueError naming the least ratio if there is none.
    """
    check_positive("max_perplexity_ratio", most)
    fit = [point for point in points if point.ratio <= most]
    if not fit:
        least = min(points, key=lambda point: point.ratio)
        raise ValueError(
            f"max_perplexity_ratio={most:g}: the least is {least.ratio:.3g}, with {least.drop} layers removed; "
            "remove fewer, or allow more"
        )
    return max(fit, key=lambda point: point.drop)


def save_frontier(folder: Path, points: Sequence[Point], most: float | None) -> None:
    """Writes plans/drop-4.json and so on, and with a ratio `most` the plan of the `deepest` as pruning.json."""
    if most is not None:
        deepest(points, most).plan.save(folder / PLAN_FILE)
    (folder / "plans").mkdir(exist_ok=True)
    for point in points:
        point.plan.save(folder / "plans" / f"drop-{point.drop}.json")


def frontier_results(dense: Mapping[str, Any], points: Sequence[Point]) -> dict[str, Any]:
    """The parts of the results: a row of the table per depth, the curve, and what the plot shows."""
    timing = {"timing": dense["timing"]} if "timing" in dense else {}
    dense = {name: value for name, value in dense.items() if name != "timing"}
    rows = [{"name": "dense", **dense}] + [{"name": f"{point.drop} removed", **point.figures} for point in points]
    shown = ("layers", "parameters", "decode_tokens_per_s")
    return timing | {
        "models": rows,
        "frontier": [{"drop": 0, "ratio": 1.0, **{key: dense[key] for key in shown if key in dense}}]
        + [
            {"drop": p.drop, "ratio": p.ratio, **{key: p.figures[key] for key in shown if key in p.figures}}
            for p in points
        ],
        "curve": {points[0].plan.method: [[float(point.drop), point.figures["kl"]] for point in points]},
    }


def _figures(model: PreTrainedModel, dense: PreTrainedModel, held_out: Given, unseen: Given | None) -> dict[str, Any]:
    figures = e3pruner.evaluate(model, held_out, dense, precision="auto")
    if unseen is not None:
        elsewhere = e3pruner.evaluate(model, unseen, dense, precision="auto")
        figures |= {f"unseen_{name}": elsewhere[name] for name in ("kl", "perplexity")}
    return figures
