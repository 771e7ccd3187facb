"""Divergences between two distributions given by log-probabilities, and their gradient.

    forward   Σ p(log p − log q)
    reverse   Σ q(log q − log p)
    jsd       β·Σ p(log p − log m) + (1 − β)·Σ q(log q − log m),  m = βp + (1 − β)q

0·(±∞) counts as 0: outside a distribution's support its terms vanish. p > 0 where q = 0 makes `forward` +∞.
"""

import math

import torch
from torch import Tensor


def weighted(coefficient: Tensor, value: Tensor) -> Tensor:
    """coefficient·value, 0 wherever the coefficient is 0 even if the value is infinite or NaN."""
    return torch.where(coefficient == 0, 0.0, coefficient * value)


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence of each row, and g = ∂D/∂log q up to a multiple of q.

    With q = softmax(u) the gradient is ∂D/∂u = g − q·Σg, in which any multiple of q in g cancels.
    """
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward":
        return weighted(p, log_p - log_q).sum(-1), -p
    if kind == "reverse":
        terms = weighted(q, log_q - log_p)
        return terms.sum(-1), terms
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    terms = (1 - beta) * weighted(q, log_q - log_m)
    return (beta * weighted(p, log_p - log_m) + terms).sum(-1), terms


def entropy(log_p: Tensor) -> Tensor:
    """H = −Σ p log p of each row."""
    return -weighted(log_p.exp(), log_p).sum(-1)
