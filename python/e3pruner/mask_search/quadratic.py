"""A quadratic model of the divergence of a mask, fitted to the few masks that were measured.

A removed layer moves the last hidden state by δ_l, and for small moves KL ≈ ½·δᵀFδ with δ = Σ_l δ_l, F the Fisher
information at the dense model: a sum over the removed layers and over their pairs. With x ∈ {0, 1}ᶠ, 1 for removed, and
I_l the divergence without layer l alone, the divergence on batch b is

    KL_b(x) = Σ_l (w_l + u_bl)·x_l + Σ_{l<m} W_lm·x_l·x_m + noise,   s = Σ_l I_l·x_l

    w_l   ~ N(I_l, (0.05·I_l)²)
    u_bl  = I_l·(0.1·a_b + 0.25·e_bl),  a_b and e_bl ~ N(0, 1): how hard the batch is, and how hard without layer l
    W_lm  = √(I_l·I_m)·(0.1 + 0.25·g_lm),  g a Gaussian field whose values are alike for neighbouring layers,
            cov(g_lm, g_l'm') = A_ll'·A_mm' + A_lm'·A_ml',  A_lm = exp(−(l − m)²/2)
    noise ~ N(0, (0.02·s)²)

These spreads make the measurements of SmolLM2-135M with 4, 8, 12 and 15 layers removed likeliest. Another model has
others: `relearn` finds those that make its own measurements likeliest, with these as the prior. The weights have the
closed form of Gaussian process regression (Rasmussen & Williams 2006, equations 2.23 and 2.24; 5.8 for the likelihood),
so that neither pairs nor batches need features of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

GUESSED_SPREAD = 1.0  # of w_l where I_l is a guess
_LEAST = 1e-9  # nats: keeps a model whose layers do nothing from dividing by zero
_PRIOR_OF_LOG = 0.5  # standard deviation of the log of a spread: another model's may be half or twice as large
_PAIR_MEAN_UNIT = 0.1  # what one unit of the same prior is of the pairs' mean
_LEARNT_FROM = 320  # measurements at most: the likelihood costs their third power


@dataclass(frozen=True)
class Spreads:
    """Standard deviations, as shares of I_l: of w_l (`linear`), of W_lm (`pair`), of what a batch adds to all layers
    (`level`) and to each (`layer`), and of the noise; `pair_mean` is the mean of W_lm.
    """

    linear: float = 0.05
    pair: float = 0.25
    level: float = 0.1
    layer: float = 0.25
    noise: float = 0.02
    pair_mean: float = 0.1


class QuadraticModel:
    """`prior`: I_l of the F layers that may go, fp64; `spreads`: those above unless given. What is predicted is the
    mean of KL_b over `batches` batches, Σ w·x + Σ W·x·x with the fitted `linear` (F,) and `pairs` (F, F).

    `kinds` (F,) integers: a mask holds a fixed number of each kind; None: all are of one.
    """

    def __init__(
        self, prior: Tensor, batches: int, kinds: Tensor | None = None, spreads: Spreads | None = None
    ) -> None:
        self.prior = prior.clamp(min=_LEAST)
        kinds = torch.zeros(len(prior)) if kinds is None else kinds
        self._apart = kinds[:, None] != kinds
        self.scale = self.prior.median()
        self.linear = self.prior
        self.spreads = self._before = Spreads() if spreads is None else spreads
        self._root = self.prior.sqrt()
        self._batches = batches
        place = torch.arange(len(prior), dtype=prior.dtype)
        self._likeness = torch.exp(-(place[:, None] - place).square() / 2)
        self.pairs = self._prior_pairs()
        self._seen = prior.new_empty(0, len(prior))
        self._factor = prior.new_empty(0, 0)

    def fit(self, removed: Tensor, batches: Tensor, divergences: Tensor) -> None:
        """The posterior given N measurements: `removed` (N, F) of 0 and 1, `batches` (N,), `divergences` (N,)."""
        spreads = self.spreads
        parts = self._parts(removed, batches)
        covariance = sum(getattr(spreads, name) ** 2 * part for name, part in parts.items())
        self._seen, self._factor = removed, torch.linalg.cholesky(covariance)
        self.linear, self.pairs = self.prior, self._prior_pairs()
        dual = torch.cholesky_solve((divergences - self.predict(removed))[:, None], self._factor)
        seen = removed.T @ dual[:, 0]
        self.linear = self.linear + self.prior.square() * (spreads.linear**2 + spreads.layer**2 / self._batches) * seen
        self.linear += self.prior * spreads.level**2 / self._batches * (self.prior @ seen)
        together = ((removed.T * dual.T) @ removed).fill_diagonal_(0)
        field = self._likeness @ (self._root[:, None] * together * self._root) @ self._likeness
        self.pairs = self.pairs + spreads.pair**2 * (self._root[:, None] * field * self._root).fill_diagonal_(0)

    def relearn(self, removed: Tensor, batches: Tensor, divergences: Tensor) -> None:
        """Takes the `spreads` that make the N measurements likeliest, under a log-normal prior around those that it
        began with. `fit` uses them from then on. Of many measurements evenly spaced ones count.
        """
        chosen = torch.arange(0, len(removed), math.ceil(len(removed) / _LEARNT_FROM))
        removed, batches, divergences = removed[chosen], batches[chosen], divergences[chosen]
        names, parts = zip(*self._parts(removed, batches).items(), strict=True)
        scale = divergences.square().mean().clamp(min=_LEAST**2)
        stacked = torch.stack(parts) / scale
        alone = (divergences - removed @ self.prior) / scale.sqrt()
        together = self._pair_sizes(removed) / scale.sqrt()
        logs = torch.tensor([math.log(getattr(self._before, name)) for name in names], dtype=removed.dtype)
        shift = torch.zeros(len(names) + 1, dtype=removed.dtype, requires_grad=True)
        jitter = torch.eye(len(removed), dtype=removed.dtype) * _LEAST

        def loss() -> Tensor:
            squares = (2 * (logs + shift[:-1])).exp()
            factor = torch.linalg.cholesky((squares[:, None, None] * stacked).sum(0) + jitter)
            left = alone - (self._before.pair_mean + _PAIR_MEAN_UNIT * shift[-1]) * together
            white = torch.linalg.solve_triangular(factor, left[:, None], upper=False)
            # Smooth beyond the prior's reach: a spread that nothing speaks of stays where it was.
            prior = (shift / _PRIOR_OF_LOG).square().sum() / 2
            total: Tensor = white.square().sum() / 2 + factor.diagonal().log().sum() + prior
            return total

        optimizer = torch.optim.LBFGS([shift], max_iter=30, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return float(value.detach())

        with torch.enable_grad():
            optimizer.step(closure)
        found = (logs + shift[:-1].detach()).exp().tolist()
        mean = self._before.pair_mean + _PAIR_MEAN_UNIT * float(shift[-1].detach())
        self.spreads = replace(self._before, **dict(zip(names, found, strict=True)), pair_mean=mean)

    def predict(self, removed: Tensor) -> Tensor:
        """Σ w·x + Σ W·x·x of masks (N, F)."""
        return removed @ self.linear + (removed @ self.pairs * removed).sum(-1) / 2

    def deviation(self, removed: Tensor, other: Tensor) -> Tensor:
        """Standard deviation (N,) of predict(removed) − predict(other), masks (N, F) and (F,), given all measured."""
        masks = torch.cat([removed, other[None]])
        known = torch.linalg.solve_triangular(self._factor, self._target(self._seen, masks), upper=False)
        covariance = self._target(masks, masks) - known.T @ known
        variance = covariance.diagonal()
        squares: Tensor = variance[:-1] + variance[-1] - 2 * covariance[:-1, -1]
        return squares.clamp(min=0).sqrt()

    def marginal(self, removed: Tensor) -> Tensor:
        """∂/∂x_l of `predict` at one mask (F,): what removing layer l costs, given the others that are gone."""
        return self.linear + self.pairs @ removed

    def descend(self, removed: Tensor, fits: Callable[[Tensor], bool] = lambda mask: True) -> Tensor:
        """The mask (F,) that no swap of a removed and a kept layer of one kind improves, by steepest descent over masks
        that `fits` accepts."""
        while True:
            marginal = self.marginal(removed)
            gain = marginal[:, None] - marginal + self.pairs  # [out, in]: `out` comes back, `in` goes
            gain = gain.masked_fill((removed[:, None] == 0) | (removed == 1) | self._apart, -torch.inf)
            swaps = gain.flatten()
            better = swaps.argsort(descending=True, stable=True)[: int((swaps > 1e-9 * self.scale).sum())]
            coming = (_swapped(removed, *divmod(swap, len(removed))) for swap in better.tolist())
            following = next(filter(fits, coming), None)
            if following is None:
                return removed
            removed = following

    def swaps(self, removed: Tensor) -> Tensor:
        """The masks (N, F) that exchange one layer of the mask `removed` (F,) for another of its kind."""
        legal = ~((removed[:, None] == 0) | (removed == 1) | self._apart)
        rows = [_swapped(removed, *pair) for pair in legal.nonzero().tolist()]
        return torch.stack(rows) if rows else removed.new_empty(0, len(removed))

    def _prior_pairs(self) -> Tensor:
        return (self.spreads.pair_mean * self._root[:, None] * self._root).fill_diagonal_(0)

    def _pair_sizes(self, masks: Tensor) -> Tensor:
        """Σ_{l<m} √(I_l·I_m)·x_l·x_m of masks (N, F)."""
        roots = masks * self._root
        return (roots.sum(1).square() - roots.square().sum(1)) / 2

    def _target(self, some: Tensor, others: Tensor) -> Tensor:
        """Covariance of the mean over all batches with it, or with one of the batches."""
        spreads = self.spreads
        linear, pair = spreads.linear**2 * self._linear(some, others), spreads.pair**2 * self._pair(some, others)
        return linear + pair + self._of_batch(some, others) / self._batches

    def _of_batch(self, some: Tensor, others: Tensor) -> Tensor:
        """Covariance (N, M) of what one batch adds."""
        level = (some @ self.prior)[:, None] * (others @ self.prior)
        return self.spreads.level**2 * level + self.spreads.layer**2 * self._linear(some, others)

    def _parts(self, removed: Tensor, batches: Tensor) -> dict[str, Tensor]:
        """What each spread's square is multiplied by in the covariance (N, N) of measurements."""
        level, same = removed @ self.prior, (batches[:, None] == batches).to(removed.dtype)
        linear = self._linear(removed, removed)
        return {
            "linear": linear,
            "pair": self._pair(removed, removed),
            "level": level[:, None] * level * same,
            "layer": linear * same,
            "noise": level.square().diag(),
        }

    def _linear(self, some: Tensor, others: Tensor) -> Tensor:
        """Σ_l I_l²·x_l·y_l of masks (N, F) and (M, F): (N, M)."""
        return (some * self.prior.square()) @ others.T

    def _pair(self, some: Tensor, others: Tensor) -> Tensor:
        """What pairs share, for g of variance 1: (N, M)."""
        a, b, likeness = some * self._root, others * self._root, self._likeness
        # Over all l, m and l', m' it is (aᵀAb)², half of it for l < m and l' < m'; l = m and l' = m' are no pairs.
        all_pairs, left, right = a @ likeness @ b.T, likeness @ b.T, a @ likeness
        same = a.square() @ left.square() + right.square() @ b.square().T
        both = a.square() @ likeness.square() @ b.square().T
        shared: Tensor = (all_pairs.square() - same + both) / 2
        return shared


def _swapped(removed: Tensor, back: int, gone: int) -> Tensor:
    """The mask (F,) in which layer `back` is there again and layer `gone` is not."""
    other = removed.clone()
    other[back], other[gone] = 0.0, 1.0
    return other
