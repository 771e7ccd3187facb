"""Gumbel-TopK: sample exact-K masks around the best one known, and learn from their divergences which layer to keep.

The logits θ of E³-Pruner (arXiv 2511.17205) are here, in units of the median layer, what a `QuadraticModel` of all
measurements so far says it costs to remove each layer. A straight-through gradient is not used: it needs the backward
pass and every removed layer, and leads away from good masks under Adam (docs/method.md). Magnitudes survive: a layer
that is fatal to remove keeps a logit far above the noise.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from e3kernels.profiling import named_range
from e3pruner.mask_search.method import Search, search_method
from e3pruner.mask_search.methods.bi import cosine_distance
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import (
    leave_one_out_scores,
    lowest,
    removal_mask,
    removed_share,
    removed_units,
    sampled,
    state_distances,
)
from e3pruner.mask_search.quadratic import GUESSED_SPREAD, Spreads
from e3pruner.mask_search.study import Study
from e3pruner.vocabulary import check_choice, check_integer, check_positive

_START_TOKENS = 1024  # calibration tokens of the importance start, which is corrected by all that follows
_LAST_NOISE = 0.4  # of the first
_DRAWN = 8  # masks for each that is measured
_SETTLED = 3  # steps in a row
_STEPS_SHARE, _SHARE = 0.15, 0.22  # of what greedy would cost: of all steps, and of the search

STARTS = ("kl", "bi", "uniform", "random")


@search_method("gumbel-topk", sublayers=True, quotas=True)
def gumbel_topk(
    problem: SearchProblem,
    *,
    steps: int | None = None,
    samples: int = 8,
    noise: float = 1.0,
    finalists: int = 8,
    start: str = "kl",
    tolerance: float = 0.0005,
    warm: list[list[int]] | None = None,
) -> Search:
    """Importance start, steps of `samples` masks on one batch each until nothing better is expected, a final choice
    and exchanges on all calibration tokens.

    The search grows with its text. It takes at most `steps` steps; unless told, three for every unit that goes, and
    more as long as they have cost less than 0.15 of what greedy would, L·n/2 dense passes. All of it may cost 0.22.

    1. I_l, the mean KL without layer l alone, is the prior of the model and its first measurements. Masks to start from
       are the lowest I_l, and, of whole layers, the lowest block influence and the run of neighbours that turns the
       hidden state least, which cost a dense pass and often know better which layers may go together. With `start`
       "bi", "uniform" or "random" (in 0 … 1) such values alone take their place, scaled to add up to the KL of their
       mask, and the model trusts them less. Beside them stands what is nearest to each of `warm`, lists of units that
       a search for another number of them has removed.
    2. Each step draws masks, the K largest of θ + κ·g, eight times as many as it measures; runs of neighbouring layers,
       whole or filled up with the cheapest others, stand beside them. Of those that are new to the step's batch it
       takes the ones with the lowest predicted divergence less three standard deviations of its difference from the
       model's own best mask, measures them and that best mask on the batch, and fits the model again; the model's own
       spreads are learnt again whenever it has half as many measurements more. κ falls geometrically from `noise` to
       0.4 of it, and again every 3n steps. It stops, after 3n steps at the earliest, once in three of them in a row no
       mask is expected to be below the best by more than the share `tolerance` of its KL.
    3. Of the masks measured so far the model's `finalists` best and the starts race: all are measured on one batch
       after another, and who is by two standard deviations worse than the best one falls out. Those that exchange one
       layer of the winner, and are not by two standard deviations worse, race against it likewise, until there are
       none. The best of those measured on all the calibration tokens is final.
    """
    if steps is not None:
        check_integer("steps", steps, 1)
    check_integer("samples", samples, 2)
    check_integer("finalists", finalists, 1)
    check_positive("noise", noise)
    check_choice("start", start, STARTS)
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r} must be from 0 to below 1")
    count, cycle = len(problem.batches), 3 * problem.drop
    whole = sum(problem.calibration.sizes["text"])
    greedy = len(problem.free) * problem.drop / 2 * whole / problem.units.units_per_layer
    start_batches = _start_batches(problem) if start == "kl" else range(0)
    problem.expect(problem.units.count * len(start_batches) + (steps or cycle) * samples + 2 * finalists * count)
    starts = _starts(problem, start, start_batches)
    importance = starts[0] if start == "kl" else _in_nats(problem, starts[0])
    study = Study(problem, importance, None if start == "kl" else Spreads(linear=GUESSED_SPREAD))
    study.measure_alone(start_batches)
    begun = [lowest(problem, values) for values in starts]
    begun += [_nearest(problem, units, importance) for units in warm or []]
    first = torch.stack([removal_mask(problem, units) for units in begun]).unique(dim=0)
    model, best = study.model, first[study.model.predict(first).argmin()]
    yield {"importance": importance, "removed": removed_units(problem, best)}

    step, settled = 0, 0
    while step < (steps or cycle) or (steps is None and problem.account.cost < _STEPS_SHARE * greedy):
        kappa = noise * _LAST_NOISE ** (step % (steps or cycle) / max(1, (steps or cycle) - 1))
        logits = model.marginal(best) / model.scale
        drawn = sampled(problem, logits.expand(_DRAWN * (samples - 1), -1), kappa, step)
        drawn = torch.cat([drawn, _runs(problem, model.marginal(best))]).unique(dim=0)
        known = best[None] if step else first
        chosen = torch.cat([study.promising(drawn, best, samples - 1, step % count), known]).unique(dim=0)
        found = study.measure(chosen, step % count)
        with named_range("optimizer"):
            best = study.lowest(torch.cat([best[None], study.best_known(2)]))
            gain = study.expected_gain(drawn, best)
        yield {
            "score": sum(found) / len(found),
            "removed": removed_units(problem, best),
            "removed_share": removed_share(problem, chosen),
            "logits": logits.tolist(),
            "noise_scale": kappa,
            "drop": problem.drop,
            "expected_gain": gain,
        }
        step, settled = step + 1, settled + 1 if gain < tolerance else 0
        if step >= cycle and settled >= _SETTLED:
            break
    rivals = tried = torch.cat([first, best[None], study.best_known(finalists)]).unique(dim=0)
    while True:
        record = study.race(rivals)
        yield record
        best = removal_mask(problem, record["removed"])
        near = study.exchanges(best, finalists, tried)
        if not len(near) or problem.account.cost > _SHARE * greedy:
            return list(record["removed"])
        rivals, tried = torch.cat([best[None], near]), torch.cat([tried, near])


def _nearest(problem: SearchProblem, units: list[int], values: list[float]) -> list[int]:
    """The units that may go, most of `units` among them and otherwise those of lowest `values`."""
    if not set(units) <= set(range(problem.units.count)):
        raise ValueError(f"warm names {units}; the model has the units 0 to {problem.units.count - 1}")
    return cast(list[int], problem.units.cheapest(values, like=units))  # `units_of` has seen that there is one


def _runs(problem: SearchProblem, costs: Tensor) -> Tensor:
    """Masks (N, F): of every run of 2 to n neighbouring units, all of it and the units of lowest `costs` (F,) beside
    it. None where a configuration makes demands, few of which a run would meet.
    """
    width, found = len(costs), []
    if problem.units.demands:
        return costs.new_empty(0, width)
    least = costs.min() - 1.0
    for length in range(2, problem.drop + 1):
        for begin in range(width - length + 1):
            values = costs.clone()
            values[begin : begin + length] = least
            found.append(values)
    if not found:
        return costs.new_empty(0, width)
    return sampled(problem, torch.stack(found), 0.0, 0)


def _starts(problem: SearchProblem, start: str, batches: range) -> list[list[float]]:
    """One value per unit for each mask to start from; those of the prior come first."""
    if start == "kl":
        # First: its dense passes are the teacher's too.
        influence = []
        if problem.units.units_per_layer == 1:
            influence = [state_distances(problem, 1, cosine_distance), _straightest(problem)]
        return [leave_one_out_scores(problem, batches), *influence]
    if start == "bi":
        return [state_distances(problem, 1, cosine_distance)]
    if start == "uniform":
        return [[1.0] * problem.units.count]
    generator = torch.Generator().manual_seed(problem.seed)
    return [torch.rand(problem.units.count, dtype=torch.float64, generator=generator).tolist()]


def _straightest(problem: SearchProblem) -> list[float]:
    """One value per layer, 0 in the run of `drop` neighbours that turns the hidden state least, 1 elsewhere."""
    distances = state_distances(problem, problem.drop, cosine_distance)
    begin = distances.index(min(distances))
    return [float(not begin <= layer < begin + problem.drop) for layer in range(problem.units.count)]


def _in_nats(problem: SearchProblem, values: list[float]) -> list[float]:
    """`values` in the unit of KL: scaled so that those of their lowest mask add up to its KL on the first batch."""
    removed = lowest(problem, values)
    (kl,) = problem.score([problem.mask(removed)], [0])
    total = sum(values[unit] for unit in removed)
    return [value * kl / total for value in values]


def _start_batches(problem: SearchProblem) -> range:
    """The first batches, until they hold enough tokens."""
    tokens = 0
    for number, batch in enumerate(problem.batches, start=1):
        tokens += batch.input_ids.numel()
        if tokens >= _START_TOKENS:
            return range(number)
    return range(len(problem.batches))
