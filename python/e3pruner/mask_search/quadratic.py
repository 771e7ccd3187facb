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

The spreads are those that make the measurements of SmolLM2-135M with 4, 8, 12 and 15 layers removed likeliest. The
weights have the closed form of Gaussian process regression (Rasmussen & Williams 2006, equations 2.23 and 2.24), so
that neither pairs nor batches need features of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MEASURED_SPREAD, GUESSED_SPREAD = 0.05, 1.0  # of w_l where I_l was measured, and where it is a guess
_LAYER_SPREAD, _LEVEL_SPREAD = 0.25, 0.1  # of a batch
_PAIR_MEAN, _PAIR_SPREAD = 0.1, 0.25
_NOISE = 0.02
_LEAST = 1e-9  # nats: keeps a model whose layers do nothing from dividing by zero


class QuadraticModel:
    """`prior`: I_l of the F layers that may go, fp64; `spread`: of w_l around it. What is predicted is the mean of
    KL_b over `batches` batches, Σ w·x + Σ W·x·x with the fitted `linear` (F,) and `pairs` (F, F).

    `kinds` (F,) integers: a mask holds a fixed number of each kind; None: all are of one.
    """

    def __init__(
        self, prior: Tensor, batches: int, kinds: Tensor | None = None, spread: float = MEASURED_SPREAD
    ) -> None:
        self.prior = prior.clamp(min=_LEAST)
        kinds = torch.zeros(len(prior)) if kinds is None else kinds
        self._apart = kinds[:, None] != kinds
        self.scale = self.prior.median()
        self.linear = self.prior
        root = self.prior.sqrt()
        self.pairs = self._prior_pairs = (_PAIR_MEAN * root[:, None] * root).fill_diagonal_(0)
        self._root = _PAIR_SPREAD**0.5 * root
        self._batches = batches
        self._spread = spread
        place = torch.arange(len(prior), dtype=prior.dtype)
        self._likeness = torch.exp(-(place[:, None] - place).square() / 2)
        self._seen = prior.new_empty(0, len(prior))
        self._factor = prior.new_empty(0, 0)

    def fit(self, removed: Tensor, batches: Tensor, divergences: Tensor) -> None:
        """The posterior given N measurements: `removed` (N, F) of 0 and 1, `batches` (N,), `divergences` (N,)."""
        covariance = self._shared(removed, removed)
        covariance += self._of_batch(removed, removed) * (batches[:, None] == batches)
        level = removed @ self.prior
        covariance.diagonal().add_((_NOISE * level).square())
        self._seen, self._factor = removed, torch.linalg.cholesky(covariance)
        self.linear, self.pairs = self.prior, self._prior_pairs
        dual = torch.cholesky_solve((divergences - self.predict(removed))[:, None], self._factor)
        seen = removed.T @ dual[:, 0]
        self.linear = self.linear + self.prior.square() * (self._spread**2 + _LAYER_SPREAD**2 / self._batches) * seen
        self.linear += self.prior * _LEVEL_SPREAD**2 / self._batches * (self.prior @ seen)
        together = ((removed.T * dual.T) @ removed).fill_diagonal_(0)
        field = self._likeness @ (self._root[:, None] * together * self._root) @ self._likeness
        self.pairs = self.pairs + (self._root[:, None] * field * self._root).fill_diagonal_(0)

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

    def _target(self, some: Tensor, others: Tensor) -> Tensor:
        """Covariance of the mean over all batches with it, or with one of the batches."""
        return self._shared(some, others) + self._of_batch(some, others) / self._batches

    def _shared(self, some: Tensor, others: Tensor) -> Tensor:
        """Covariance (N, M) of what all batches have in common."""
        linear = (some * (self._spread * self.prior).square()) @ others.T
        a, b, likeness = some * self._root, others * self._root, self._likeness
        # Over all l, m and l', m' it is (aᵀAb)², half of it for l < m and l' < m'; l = m and l' = m' are no pairs.
        all_pairs, left, right = a @ likeness @ b.T, likeness @ b.T, a @ likeness
        same = a.square() @ left.square() + right.square() @ b.square().T
        both = a.square() @ likeness.square() @ b.square().T
        pairs: Tensor = (all_pairs.square() - same + both) / 2
        return linear + pairs

    def _of_batch(self, some: Tensor, others: Tensor) -> Tensor:
        """Covariance (N, M) of what one batch adds."""
        level = (some @ self.prior)[:, None] * (others @ self.prior)
        return _LEVEL_SPREAD**2 * level + _LAYER_SPREAD**2 * (some * self.prior.square()) @ others.T


def _swapped(removed: Tensor, back: int, gone: int) -> Tensor:
    """The mask (F,) in which layer `back` is there again and layer `gone` is not."""
    other = removed.clone()
    other[back], other[gone] = 0.0, 1.0
    return other
