"""What a search has measured, the model fitted to it, and what the model says to measure next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from e3kernels.profiling import named_range
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import by_unit, lowest, removal_mask, removed_units, scores_of
from e3pruner.mask_search.quadratic import QuadraticModel

_HOPE = 3.0  # standard deviations
_BEHIND = 2.0  # standard deviations


class Study:
    """Measurements of masks (N, F), 1 for removed, and the `model` of them; its prior is `importance`, one per unit."""

    def __init__(self, problem: SearchProblem, importance: list[float], spread: float) -> None:
        self.problem = problem
        group = {unit: number for number, (members, _) in enumerate(problem.units.groups) for unit in members}
        kinds = torch.tensor([group[unit] for unit in problem.free])  # only units of one group may change places
        prior = torch.tensor([importance[unit] for unit in problem.free], dtype=torch.float64)
        self.model = QuadraticModel(prior, len(problem.batches), kinds, spread)
        self._masks = prior.new_empty(0, len(prior))
        self._batches = torch.empty(0, dtype=torch.int64)
        self._scores = prior.new_empty(0)

    def measure(self, masks: Tensor, batch: int) -> list[float]:
        """The divergence of each of `masks` on one batch; fits the model to it."""
        found = scores_of(self.problem, masks, [batch])
        new = self._new(masks, batch)
        self._masks = torch.cat([self._masks, masks[new]])
        self._batches = torch.cat([self._batches, torch.full((int(new.sum()),), batch)])
        self._scores = torch.cat([self._scores, self._scores.new_tensor(found)[new]])
        with named_range("optimizer"):
            self.model.fit(self._masks, self._batches, self._scores)
        return found

    def measure_alone(self, batches: Iterable[int]) -> None:
        """Every unit that may go, alone."""
        for batch in batches:
            self.measure(torch.eye(len(self.problem.free), dtype=torch.float64), batch)

    def promising(self, masks: Tensor, best: Tensor, count: int, batch: int) -> Tensor:
        """The `count` masks, of those not yet measured on `batch`, that may be furthest below `best`."""
        masks = masks[self._new(masks, batch)]
        hope = self.model.predict(masks) - _HOPE * self.model.deviation(masks, best)
        return masks[hope.argsort(stable=True)[:count]]

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
        return whole[self.model.predict(whole).argsort(stable=True)[:count]]

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
