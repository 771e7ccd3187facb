"""What several search methods need."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

import e3kernels as e3k
from e3pruner.mask_search.problem import SearchProblem

_FAR_BELOW = -1e6


def lowest(problem: SearchProblem, values: Sequence[float]) -> list[int]:
    """The units with the lowest values, ascending; of equal values the deeper one comes first."""
    return cast(list[int], problem.units.cheapest(values))  # `units_of` has seen that there is one


def by_unit(problem: SearchProblem, values: Tensor) -> list[float]:
    """`values` (F,) of the units that may go, at their places among all units; 0 for the others."""
    found = dict(zip(problem.free, values.tolist(), strict=True))
    return [found.get(unit, 0.0) for unit in range(problem.units.count)]


def fitting(problem: SearchProblem, removed: Tensor, values: Tensor | None = None) -> Tensor:
    """For each of the masks `removed` (N, F) the nearest one that may go: itself where it may. Of equally near ones it
    is the one with the lowest `values` (F,), or the deeper one.
    """
    units = problem.units
    if not units.demands:
        return removed
    spread = [0.0] * units.count if values is None else by_unit(problem, values)

    def nearest(chosen: list[int]) -> list[int]:
        return chosen if units.fits(chosen) else cast(list[int], units.cheapest(spread, like=chosen))

    return torch.stack([removal_mask(problem, nearest(removed_units(problem, mask))) for mask in removed]).to(removed)


def sampled(problem: SearchProblem, logits: Tensor, noise: float, step: int) -> Tensor:
    """Masks (N, F), 1 for removed: of each group of units the lowest θ + κ·g go. `logits` θ (N, F) or (F,)."""
    removed = torch.zeros_like(logits)
    for members, count in problem.units.groups:
        inside = removal_mask(problem, members).to(logits.dtype)
        # What is in no group of this round lies far below, where no noise reaches.
        scores = torch.where(inside == 1, logits, _FAR_BELOW)
        kept = e3k.gumbel_topk(scores, len(members) - count, noise_scale=noise, seed=problem.seed, step=step).mask
        removed += inside * (1 - kept)
    one = removed.dim() == 1
    return fitting(problem, removed[None])[0] if one else fitting(problem, removed)


def leave_one_out_scores(problem: SearchProblem, batches: Sequence[int], measure: str = "kl") -> list[float]:
    """I_l: the mean KL without unit l alone, for every unit, over the batches with these numbers; infinite for layers
    that must stay."""
    units = problem.units
    fixed = {layer for demand in units.demands for layer in demand.fixed if units.units_per_layer == 1}
    alone = [unit for unit in range(units.count) if unit not in fixed]
    scores = dict(zip(alone, problem.score([problem.mask([unit]) for unit in alone], batches, measure), strict=True))
    return [scores.get(unit, math.inf) for unit in range(problem.units.count)]


def state_distances(problem: SearchProblem, span: int, measure: Callable[[Tensor], Tensor]) -> list[float]:
    """Mean of `measure`(cos) over the calibration tokens, for each of the L − span + 1 runs of `span` layers.

    cos, in fp32, is that of the angle between what enters the run and what leaves it.
    """

    def distances(batch: int) -> list[float]:
        rows = problem.rows(batch)
        states = [rows.at_counted(state.flatten(0, 1)).float() for state in problem.states(batch)]
        cosines = [torch.cosine_similarity(a, b, dim=-1) for a, b in zip(states, states[span:], strict=False)]
        return [measure(cosine).mean().item() for cosine in cosines]

    numbers, name = range(len(problem.batches)), f"{measure.__name__} {span}"
    return problem.calibration.mean([problem.measure(f"{name} {b}", b, distances) for b in numbers], numbers)


def log_z_scores(problem: SearchProblem, importance: Sequence[float]) -> Tensor:
    """The z-scores (F,), fp64, of the logs of the importance of the units that may go: where a θ can start."""
    logs = torch.tensor([importance[unit] for unit in problem.free], dtype=torch.float64).log()
    return (logs - logs.mean()) / logs.std(correction=0).clamp(min=1e-9)


def contiguous_masks(problem: SearchProblem) -> Tensor:
    """The masks (N, F), fp64, of all runs of `drop` neighbouring units that may go together; N may be 0."""
    free = set(problem.free)
    runs = [range(start, start + problem.drop) for start in problem.free]
    fits = [run for run in runs if set(run) <= free and problem.units.may_go(run)]
    masks = [removal_mask(problem, run) for run in fits]
    return torch.stack(masks) if masks else torch.empty(0, len(problem.free), dtype=torch.float64)


def run_starts(problem: SearchProblem) -> list[int]:
    """Where a run of `drop` neighbouring layers that may all go can begin; raises `ValueError` if nowhere."""
    free = set(problem.free)
    runs = {start: range(start, start + problem.drop) for start in problem.free}
    starts = [start for start, run in runs.items() if set(run) <= free and problem.units.fits(run)]
    if not starts:
        demands = "".join(f"; {demand.reason}" for demand in problem.units.demands)
        raise ValueError(
            f"protect leaves no {problem.drop} neighbouring layers that may all go; protect fewer{demands}"
        )
    return starts


def removed_units(problem: SearchProblem, removed: Tensor) -> list[int]:
    """The layers whose entry in `removed`, one for each layer that may go, is not 0."""
    return [layer for layer, gone in zip(problem.free, removed.tolist(), strict=True) if gone]


def removal_mask(problem: SearchProblem, units: Sequence[int]) -> Tensor:
    """The mask (F,), fp64, whose `removed_units` are `units`."""
    gone = set(units)
    return torch.tensor([float(unit in gone) for unit in problem.free], dtype=torch.float64)


def scores_of(problem: SearchProblem, removed: Tensor, batches: Sequence[int] | None = None) -> list[float]:
    """`problem.score` of the masks `removed` (N, F)."""
    return problem.score([problem.mask(removed_units(problem, mask)) for mask in removed], batches)


def removed_share(problem: SearchProblem, removed: Tensor) -> list[float]:
    """For every unit of the model the share of the masks `removed` (N, F) that lack it."""
    share = dict(zip(problem.free, removed.mean(0).tolist(), strict=True))
    return [share.get(unit, 0.0) for unit in range(problem.units.count)]
