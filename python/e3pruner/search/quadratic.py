"""A quadratic model of the divergence of a mask, fitted to the few masks that were measured.

A removed layer moves the last hidden state by δ_l, and for small moves KL ≈ ½·δᵀFδ with δ = Σ_l δ_l, F the Fisher
information at the dense model: a sum over the removed layers and over their pairs. With x ∈ {0, 1}ᶠ, 1 for removed, on
batch b,

    KL_b(x) = a_b + Σ_l w_l·x_l + Σ_{l<m} W_lm·x_l·x_m + noise
    w_l ~ N(I_l, (½·I_l + 0.3·I)²),  W_lm ~ N(0, (0.3·I)²),  I = median of I_l,

I_l the divergence without layer l alone and a_b free. The weights have the closed form of Gaussian process regression
(Rasmussen & Williams 2006, equation 2.11) with the kernel Σ v_l·x_l·x'_l + v·c·(c − 1)/2, c = x·x', so that the pairs
need no features of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LINEAR_SPREAD = 0.5
_PAIR_SPREAD = 0.3
_NOISE = 0.05  # of the mean divergence: what the model cannot explain
_LEAST_SCALE = 1e-9  # nats: keeps a model whose layers do nothing from dividing by zero
_OFFSET_SPREAD = 10.0  # in units of the mean divergence: free


class QuadraticModel:
    """`prior`: I_l of the F layers that may go, fp64. `linear` (F,) and `pairs` (F, F) are the fitted w and W.

    `kinds` (F,) integers: a mask holds a fixed number of each kind; None: all are of one.
    """

    def __init__(self, prior: Tensor, kinds: Tensor | None = None) -> None:
        self.prior = prior
        kinds = torch.zeros(len(prior)) if kinds is None else kinds
        self._apart = kinds[:, None] != kinds
        self.scale = prior.median().clamp(min=_LEAST_SCALE)
        self.linear = prior
        self.pairs = prior.new_zeros(len(prior), len(prior))
        self._linear_variance = (_LINEAR_SPREAD * prior + _PAIR_SPREAD * self.scale).square()
        self._pair_variance = (_PAIR_SPREAD * self.scale).square()

    def fit(self, removed: Tensor, batches: Tensor, divergences: Tensor) -> None:
        """The posterior mean given N measurements: `removed` (N, F) of 0 and 1, `batches` (N,), `divergences` (N,)."""
        level = divergences.mean().clamp(min=_LEAST_SCALE)
        common = removed @ removed.T
        covariance = (removed * self._linear_variance) @ removed.T + self._pair_variance * common * (common - 1) / 2
        covariance += (_OFFSET_SPREAD * level).square() * (batches[:, None] == batches)
        covariance.diagonal().add_((_NOISE * level).square())
        dual = torch.linalg.solve(covariance, divergences - removed @ self.prior)
        self.linear = self.prior + self._linear_variance * (removed.T @ dual)
        self.pairs = self._pair_variance * (removed.T * dual) @ removed
        self.pairs.fill_diagonal_(0)

    def predict(self, removed: Tensor) -> Tensor:
        """Σ w·x + Σ W·x·x of masks (N, F), without an offset."""
        return removed @ self.linear + (removed @ self.pairs * removed).sum(-1) / 2

    def marginal(self, removed: Tensor) -> Tensor:
        """∂/∂x_l of `predict` at one mask (F,): what removing layer l costs, given the others that are gone."""
        return self.linear + self.pairs @ removed

    def descend(self, removed: Tensor) -> Tensor:
        """The mask (F,) that no swap of a removed and a kept layer of one kind improves, by steepest descent."""
        removed = removed.clone()
        while True:
            marginal = self.marginal(removed)
            gain = marginal[:, None] - marginal + self.pairs  # [out, in]: `out` comes back, `in` goes
            gain = gain.masked_fill((removed[:, None] == 0) | (removed == 1) | self._apart, -torch.inf)
            best = int(gain.argmax())
            if not gain.flatten()[best] > 1e-9 * self.scale:
                return removed
            back, gone = divmod(best, len(removed))
            removed[back], removed[gone] = 0.0, 1.0
