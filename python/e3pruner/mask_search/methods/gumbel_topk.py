"""Gumbel-TopK: sample exact-K masks around the best one known, and learn from their divergences which layer to keep.

The logits θ of E³-Pruner (arXiv 2511.17205) are here, in units of the median layer, what a `QuadraticModel` of all
measurements so far says it costs to remove each layer. A straight-through gradient is not used: it needs the backward
pass and every removed layer, and leads away from good masks under Adam (docs/method.md). Magnitudes survive: a layer
that is fatal to remove keeps a logit far above the noise.
"""

from __future__ import annotations

import torch

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
from e3pruner.mask_search.quadratic import GUESSED_SPREAD, MEASURED_SPREAD
from e3pruner.mask_search.study import Study
from e3pruner.vocabulary import check_choice, check_integer, check_positive

_START_TOKENS = 1024  # calibration tokens of the importance start, which is corrected by all that follows
_LAST_NOISE = 0.4  # of the first
_DRAWN = 8  # masks for each that is measured

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
) -> Search:
    """Importance start, `steps` rounds of `samples` masks on one batch each, final choice on all calibration tokens.

    Unless told, three steps for every unit that goes: the more go, the more pairs there are to learn about.

    1. I_l, the mean KL without layer l alone, is the prior of the model and its first measurements. Two masks start:
       the lowest I_l, and, of whole layers, the lowest block influence, which costs a dense pass and often knows better
       which layers may go together. With `start` "bi", "uniform" or "random" (in 0 … 1) such values alone take their
       place, scaled to add up to the KL of their mask, and the model trusts them less.
    2. Each step draws masks, the K largest of θ + κ·g, eight times as many as it measures. Of those that are new to the
       step's batch it takes the ones with the lowest predicted divergence less three standard deviations of its
       difference from the model's own best mask, measures them and that best mask on the batch, and fits the model
       again. κ falls geometrically from `noise` to 0.4 of it.
    3. Of the masks measured so far the model's `finalists` best and the starts race: all are measured on one batch
       after another, and who is by two standard deviations worse than the best one falls out. Of those measured on all
       the calibration tokens the best is final.
    """
    steps = 3 * problem.drop if steps is None else steps
    check_integer("steps", steps, 1)
    check_integer("samples", samples, 2)
    check_integer("finalists", finalists, 1)
    check_positive("noise", noise)
    check_choice("start", start, STARTS)
    count = len(problem.batches)
    start_batches = _start_batches(problem) if start == "kl" else range(0)
    problem.expect(problem.units.count * len(start_batches) + steps * samples + finalists * count)
    starts = _starts(problem, start, start_batches)
    importance = starts[0] if start == "kl" else _in_nats(problem, starts[0])
    study = Study(problem, importance, MEASURED_SPREAD if start == "kl" else GUESSED_SPREAD)
    study.measure_alone(start_batches)
    first = torch.stack([removal_mask(problem, lowest(problem, values)) for values in starts])
    model, best = study.model, first[0]
    yield {"importance": importance, "removed": removed_units(problem, best)}

    for step in range(steps):
        kappa = noise * _LAST_NOISE ** (step / max(1, steps - 1))
        logits = model.marginal(best) / model.scale
        drawn = sampled(problem, logits.expand(_DRAWN * (samples - 1), -1), kappa, step).unique(dim=0)
        known = best[None] if step else first
        chosen = torch.cat([study.promising(drawn, best, samples - 1, step % count), known]).unique(dim=0)
        found = study.measure(chosen, step % count)
        with named_range("optimizer"):
            best = study.descend(best)
        yield {
            "score": sum(found) / len(found),
            "removed": removed_units(problem, best),
            "removed_share": removed_share(problem, chosen),
            "logits": logits.tolist(),
            "noise_scale": kappa,
            "drop": problem.drop,
        }
    candidates = torch.cat([first, best[None], study.best_known(finalists)])
    yield (last := study.race(candidates.unique(dim=0)))
    return list(last["removed"])


def _starts(problem: SearchProblem, start: str, batches: range) -> list[list[float]]:
    """One value per unit for each mask to start from; those of the prior come first."""
    if start == "kl":
        # First: its dense passes are the teacher's too.
        influence = [state_distances(problem, 1, cosine_distance)] if problem.units.units_per_layer == 1 else []
        return [leave_one_out_scores(problem, batches), *influence]
    if start == "bi":
        return [state_distances(problem, 1, cosine_distance)]
    if start == "uniform":
        return [[1.0] * problem.units.count]
    generator = torch.Generator().manual_seed(problem.seed)
    return [torch.rand(problem.units.count, dtype=torch.float64, generator=generator).tolist()]


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
