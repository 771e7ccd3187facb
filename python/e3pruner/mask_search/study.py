"""What a search has measured, the model fitted to it, and what the model says to measure next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from e3kernels.profiling import named_range
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import (
    by_unit,
    leave_one_out_scores,
    lowest,
    removal_mask,
    removed_units,
    scores_of,
)
from e3pruner.mask_search.quadratic import QuadraticModel, Spreads

_HOPE = 3.0  # standard deviations
_BEHIND = 2.0  # standard deviations
_RELEARN = 1.5  # times as many measurements of several units


class Study:
    """Measurements of masks (N, F), 1 for removed, and the `model` of them; its prior is `importance`, one per unit."""

    def __init__(self, problem: SearchProblem, importance: list[float], spreads: Spreads | None = None) -> None:
        self.problem = problem
        group = {unit: number for number, (members, _) in enumerate(problem.units.groups) for unit in members}
        kinds = torch.tensor([group[unit] for unit in problem.free])  # only units of one group may change places
        prior = torch.tensor([importance[unit] for unit in problem.free], dtype=torch.float64)
        self.model = QuadraticModel(prior, len(problem.batches), kinds, spreads)
        self._masks = prior.new_empty(0, len(prior))
        self._batches = torch.empty(0, dtype=torch.int64)
        self._scores = prior.new_empty(0)
        self._to_learn = 4.0 * len(prior)  # measurements of several units, before the model's spreads are learnt again

    @classmethod
    def of_measured(cls, problem: SearchProblem, batches: Sequence[int] = (0,)) -> Study:
        """Of all divergences that the search of `problem`, which is entered, has asked for, by whatever method. Its
        prior is measured on `batches`, unless it is known.
        """
        study = cls(problem, leave_one_out_scores(problem, batches))
        masks: dict[int, list[Tensor]] = {}
        for key in sorted(problem.measurements.measured):
            # What another search has left in the same file would make this one another search.
            if key.startswith("kl ") and not problem.account.owes(key):
                _, number, bits = key.split()
                gone = [unit for unit, runs in enumerate(bits) if runs == "0"]
                if gone and set(gone) <= set(problem.free):
                    masks.setdefault(int(number), []).append(removal_mask(problem, gone))
        for batch in sorted(masks):
            study.add(torch.stack(masks[batch]), batch)
        study.fit()
        return study

    def measure(self, masks: Tensor, batch: int) -> list[float]:
        """The divergence of each of `masks` on one batch; fits the model to it."""
        found = self.add(masks, batch)
        self.fit()
        return found

    def add(self, masks: Tensor, batch: int) -> list[float]:
        """The divergence of each of `masks` on one batch, which the next fit takes into account."""
        found = scores_of(self.problem, masks, [batch])
        new = self._new(masks, batch)
        self._masks = torch.cat([self._masks, masks[new]])
        self._batches = torch.cat([self._batches, torch.full((int(new.sum()),), batch)])
        self._scores = torch.cat([self._scores, self._scores.new_tensor(found)[new]])
        return found

    def fit(self) -> None:
        """Fits the model to all measurements, and its spreads where many are new."""
        with named_range("optimizer"):
            measured = self._masks, self._batches, self._scores
            if (several := int((self._masks.sum(1) > 1).sum())) >= self._to_learn:
                self.model.relearn(*measured)
                self._to_learn = _RELEARN * several
            self.model.fit(*measured)

    def measure_alone(self, batches: Iterable[int]) -> None:
        """Every unit that may go, alone."""
        for batch in batches:
            self.measure(torch.eye(len(self.problem.free), dtype=torch.float64), batch)

    def promising(self, masks: Tensor, best: Tensor, count: int, batch: int) -> Tensor:
        """The `count` masks, of those not yet measured on `batch`, that may be furthest below `best`."""
        masks = masks[self._new(masks, batch)]
        return masks[self._hope(masks, best, _HOPE).argsort(stable=True)[:count]]

    def expected_gain(self, masks: Tensor, best: Tensor) -> float:
        """The most that one of `masks` is expected to be below `best`, as a share of it: E max(0, KL(best) − KL(x))
        under the posterior (Jones, Schonlau & Welch 1998, equation 15).
        """
        (value,) = self.model.predict(best[None])
        below, deviation = value - self.model.predict(masks), self.model.deviation(masks, best).clamp(min=1e-12)
        normal, at = torch.distributions.Normal(0.0, 1.0), below / deviation
        gain = below * normal.cdf(at) + deviation * normal.log_prob(at).exp()
        return float(gain.max() / value.clamp(min=1e-12))

    def exchanges(self, best: Tensor, count: int, tried: Tensor) -> Tensor:
        """At most `count` of the masks that exchange one unit of `best` for another of its kind, are not among `tried`
        (N, F) and not by two standard deviations worse than it, the most hopeful first.
        """
        near = self.near(best)
        near = near[[not bool((mask == tried).all(-1).any()) for mask in near]]
        hope = self._hope(near, best, _BEHIND)
        order = hope.argsort(stable=True)[:count]
        return near[order[hope[order] < self.model.predict(best[None])]]

    def near(self, best: Tensor) -> Tensor:
        """The masks that may go and exchange one unit of `best` for another of its kind."""
        near = self.model.swaps(best)
        return near[[self._fits(mask) for mask in near]]

    def ascending(self, masks: Tensor) -> Tensor:
        """`masks`, the one with the lowest prediction first."""
        return masks[self.model.predict(masks).argsort(stable=True)]

    def _hope(self, masks: Tensor, best: Tensor, deviations: float) -> Tensor:
        return self.model.predict(masks) - deviations * self.model.deviation(masks, best)

    def lowest(self, starts: Tensor) -> Tensor:
        """The lowest mask, by the model's prediction, to which it descends from one of `starts` (N, F)."""
        ends = torch.stack([self.descend(start) for start in starts])
        return ends[self.model.predict(ends).argmin()]

    def descend(self, best: Tensor) -> Tensor:
        """A mask that may go, not above `best` in the model's prediction: no swap of two units improves it, nor, where
        the configuration makes demands, which leave few swaps, does the cheapest mask by its own marginal costs.
        """
        while True:
            best = self.model.descend(best, self._fits)
            if not self.problem.units.demands:
                return best
            cheapest = lowest(self.problem, by_unit(self.problem, self.model.marginal(best)))
            other = removal_mask(self.problem, cheapest)
            costs = self.model.predict(torch.stack([other, best]))
            if not costs[1] - costs[0] > 1e-9 * self.model.scale:
                return best
            best = other

    def _fits(self, mask: Tensor) -> bool:
        units = self.problem.units
        return not units.demands or units.fits(removed_units(self.problem, mask))

    def best_known(self, count: int) -> Tensor:
        """The `count` masks with the lowest prediction among the whole ones measured so far."""
        whole: Tensor = self._masks[self._masks.sum(1) == self.problem.drop].unique(dim=0)
        whole = whole[[self._fits(mask) for mask in whole]]
        return self.ascending(whole)[:count]

    def race(self, masks: Tensor) -> dict[str, Any]:
        """The record of the final choice among `masks`: after each batch those that are clearly behind fall out."""
        entered = [removed_units(self.problem, mask) for mask in masks]
        for batch in range(len(self.problem.batches)):
            self.measure(masks, batch)
            predicted = self.model.predict(masks)
            behind = predicted - predicted.min()
            masks = masks[behind <= _BEHIND * self.model.deviation(masks, masks[predicted.argmin()])]
        last = [removed_units(self.problem, mask) for mask in masks]
        scores = scores_of(self.problem, masks)
        best = scores.index(min(scores))
        return {"score": scores[best], "removed": last[best], "finalists": entered, "last": last, "scores": scores}

    def _new(self, masks: Tensor, batch: int) -> Tensor:
        """Which of `masks` (N, F) are not yet measured on `batch`: (N,)."""
        seen = self._masks[self._batches == batch]
        return (masks[:, None] != seen).any(-1).all(-1)
