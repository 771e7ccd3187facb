"""Divergences between two distributions given by log-probabilities, and their gradient.

    forward   KL(p‖q) = Σ p(log p − log q)
    reverse   KL(q‖p) = Σ q(log q − log p)
    adaptive  α·KL(p‖q) + (1 − α)·KL(q‖p),  α = H(p)/log S in [0, 1] of each row
    jsd       β·KL(p‖m) + (1 − β)·KL(q‖m),  m = βp + (1 − β)q

0·(±∞) counts as 0: outside a distribution's support its terms vanish, and so does a part whose weight is 0. p > 0 where
q = 0 makes KL(p‖q) +∞, q > 0 where p = 0 KL(q‖p).
"""

import math

import torch
from torch import Tensor


def weighted(coefficient: Tensor, value: Tensor) -> Tensor:
    """coefficient·value, 0 wherever the coefficient is 0 even if the value is infinite or NaN."""
    return torch.where(coefficient == 0, 0.0, coefficient * value)


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float, share: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each row, and g = ∂D/∂log q up to a multiple of q; `share` (N,) is the adaptive one's α.

    With q = softmax(u) the gradient is ∂D/∂u = g − q·Σg, in which any multiple of q in g cancels. α, the teacher's, has
    none.
    """
    p, q = log_p.exp(), log_q.exp()
    if kind == "jsd":
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        terms = (1 - beta) * weighted(q, log_q - log_m)
        return (beta * weighted(p, log_p - log_m) + terms).sum(-1), terms
    forward, reverse = weighted(p, log_p - log_q), weighted(q, log_q - log_p)
    if kind == "forward":
        return forward.sum(-1), -p
    if kind == "reverse":
        return reverse.sum(-1), reverse
    value = weighted(share, forward.sum(-1)) + weighted(1 - share, reverse.sum(-1))
    return value, weighted(1 - share[:, None], reverse) - share[:, None] * p


def entropy(log_p: Tensor) -> Tensor:
    """H = −Σ p log p of each row."""
    return -weighted(log_p.exp(), log_p).sum(-1)


def entropy_share(entropy: Tensor, support: Tensor) -> Tensor:
    """H/log S of each row, held in [0, 1]; 0 where the support S is 0 or 1."""
    return (entropy / support.clamp(min=2).to(entropy.dtype).log()).clamp(0, 1)
