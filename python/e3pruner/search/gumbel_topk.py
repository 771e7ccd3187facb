"""Gumbel-TopK: sample exact-K masks around the best one known, and learn from their divergences which layer to keep.

The logits θ of E³-Pruner (arXiv 2511.17205) are here, in units of the median layer, what a `QuadraticModel` of all
measurements so far says it costs to remove each layer. A straight-through gradient is not used: it needs the backward
pass and every removed layer, and leads away from good masks under Adam (docs/method.md). Magnitudes survive: a layer
that is fatal to remove keeps a logit far above the noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from e3kernels.profiling import named_range
from e3pruner.search.bi import cosine_distance
from e3pruner.search.checks import check_choice, check_integer, check_positive
from e3pruner.search.problem import SearchProblem
from e3pruner.search.protocol import Search, layers_of, leave_one_out_scores, lowest, removed_share, sampled
from e3pruner.search.quadratic import GUESSED_SPREAD, MEASURED_SPREAD, QuadraticModel

_START_TOKENS = 1024  # calibration tokens of the importance start, which is corrected by all that follows
_LAST_NOISE = 0.4  # of the first
_DRAWN = 8  # masks for each that is measured
_HOPE = 3.0  # standard deviations
_BEHIND = 2.0  # standard deviations

STARTS = ("kl", "bi", "uniform", "random")


def gumbel_topk(
    problem: SearchProblem,
    *,
    steps: int | None = None,
    samples: int = 8,
    noise: float = 1.0,
    finalists: int = 12,
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
    study = _Study(problem, start)
    count = len(problem.batches)
    problem.expect(problem.units.count * len(study.start_batches) + steps * samples + finalists * count)
    first = study.begin()
    model, best = study.model, first[0]
    yield {"importance": study.importance, "removed": layers_of(problem, best)}

    for step in range(steps):
        kappa = noise * _LAST_NOISE ** (step / max(1, steps - 1))
        logits = model.marginal(best) / model.scale
        drawn = sampled(problem, logits.expand(_DRAWN * (samples - 1), -1), kappa, step).unique(dim=0)
        known = best[None] if step else first
        chosen = torch.cat([study.promising(drawn, best, samples - 1, step % count), known]).unique(dim=0)
        found = study.measure(chosen, step % count)
        with named_range("optimizer"):
            study.fit()
            best = model.descend(best)
        yield {
            "score": sum(found) / len(found),
            "removed": layers_of(problem, best),
            "removed_share": removed_share(problem, chosen),
            "logits": logits.tolist(),
            "noise_scale": kappa,
            "drop": problem.drop,
        }
    yield (last := study.race(torch.cat([first, study.best_known(best, finalists)]).unique(dim=0)))
    return last["removed"]


class _Study:
    """All measurements of a search, and the model fitted to them."""

    def __init__(self, problem: SearchProblem, start: str) -> None:
        self.problem = problem
        self.start = start
        self.start_batches = _start_batches(problem) if start == "kl" else range(0)
        self.masks = torch.empty(0, len(problem.free), dtype=torch.float64)
        self.batches = torch.empty(0, dtype=torch.int64)
        self.scores = torch.empty(0, dtype=torch.float64)

    def begin(self) -> Tensor:
        """Makes the model; returns the masks (1 or 2, F) to start from."""
        problem, known = self.problem, self.start == "kl"
        starts = _starts(problem, self.start, self.start_batches)
        first = torch.stack([self.mask(lowest(problem, values)) for values in starts])
        self.importance = starts[0] if known else _in_nats(problem, starts[0])
        prior = torch.tensor([self.importance[unit] for unit in problem.free], dtype=torch.float64)
        spread = MEASURED_SPREAD if known else GUESSED_SPREAD
        self.model = QuadraticModel(prior, len(problem.batches), _kinds(problem), spread)
        alone = torch.eye(len(problem.free), dtype=torch.float64)
        for batch in self.start_batches:
            self.measure(alone, batch)
        if known:
            self.fit()
        return first

    def mask(self, removed: list[int]) -> Tensor:
        return torch.tensor([float(unit in removed) for unit in self.problem.free], dtype=torch.float64)

    def measure(self, masks: Tensor, batch: int) -> list[float]:
        found = self.problem.score([self.problem.mask(layers_of(self.problem, mask)) for mask in masks], [batch])
        self.masks = torch.cat([self.masks, masks])
        self.batches = torch.cat([self.batches, torch.full((len(masks),), batch)])
        self.scores = torch.cat([self.scores, self.scores.new_tensor(found)])
        return found

    def fit(self) -> None:
        self.model.fit(self.masks, self.batches, self.scores)

    def promising(self, masks: Tensor, best: Tensor, count: int, batch: int) -> Tensor:
        """The `count` masks, of those not yet measured on `batch`, of which the model can hope most."""
        seen = self.masks[self.batches == batch]
        masks = masks[(masks[:, None] != seen).any(-1).all(-1)]
        hope = self.model.predict(masks) - _HOPE * self.model.deviation(masks, best)
        return masks[hope.argsort(stable=True)[:count]]

    def best_known(self, best: Tensor, count: int) -> Tensor:
        """The `count` masks with the lowest prediction among the whole ones measured so far, and `best`."""
        whole = self.masks[self.masks.sum(1) == self.problem.drop]
        known = torch.cat([best[None], whole]).unique(dim=0)
        return known[self.model.predict(known).argsort(stable=True)[:count]]

    def race(self, masks: Tensor) -> dict[str, Any]:
        """The record of the final choice among `masks`."""
        entered = [layers_of(self.problem, mask) for mask in masks]
        for batch in range(len(self.problem.batches)):
            self.measure(masks, batch)
            self.fit()
            predicted = self.model.predict(masks)
            behind = predicted - predicted.min()
            masks = masks[behind <= _BEHIND * self.model.deviation(masks, masks[predicted.argmin()])]
        last = [layers_of(self.problem, mask) for mask in masks]
        scores = self.problem.score([self.problem.mask(layers) for layers in last])
        best = scores.index(min(scores))
        return {"score": scores[best], "removed": last[best], "finalists": entered, "last": last, "scores": scores}


def _starts(problem: SearchProblem, start: str, batches: range) -> list[list[float]]:
    """One value a unit for each mask to start from; those of the prior come first."""
    if start == "kl":
        influence = [problem.state_distance(1, cosine_distance)] if problem.units.a_layer == 1 else []
        return [leave_one_out_scores(problem, batches), *influence]
    if start == "bi":
        return [problem.state_distance(1, cosine_distance)]
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


def _kinds(problem: SearchProblem) -> torch.Tensor:
    """The number of the group of each free unit (F,): only units of one group may change places."""
    number = {unit: index for index, (members, _) in enumerate(problem.units.groups) for unit in members}
    return torch.tensor([number[unit] for unit in problem.free])


def _start_batches(problem: SearchProblem) -> range:
    """The first batches, until they hold enough tokens."""
    tokens = 0
    for number, batch in enumerate(problem.batches, start=1):
        tokens += batch.numel()
        if tokens >= _START_TOKENS:
            return range(number)
    return range(len(problem.batches))
