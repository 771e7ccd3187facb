"""What a token's divergence and teacher entropy are made into: weights, loss, statistics, gradient of the logits.

With r = H/log S in [0, 1] (0 for S <= 1), D the divergence at temperature T and CE the cross entropy at temperature 1:

    none      w = 1                      entropy   w = 1 + γ·r                     inverse   w = 1 + γ·(1 − r)
              ℓ = w·(λT²·D + (1 − λ)·CE)
    mix       w = 1                      ℓ = r·T²·D + (1 − r)·CE

The mean is Σℓ/Σw over valid tokens, or Σℓ/num_items. Weights carry no gradient. A coefficient of 0, γ among them, takes
away what it multiplies, be it infinite or NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from e3kernels.contract import DIVERGENCES, REDUCTIONS, WEIGHTINGS, accumulate_dtype
from e3kernels.reference.columns import WHOLE, Columns
from e3kernels.reference.divergence import weighted


@dataclass(frozen=True)
class Objective:
    """The options that all losses share, by name; `scalars` are the six that they begin with."""

    temperature: float
    gamma: float
    kd_ratio: float
    beta: float
    student_softcap: float
    student_scale: float
    weighting: str
    divergence: str
    ignore_index: int

    @classmethod
    def from_arguments(cls, scalars: Tensor, weighting: int, divergence: int, ignore_index: int) -> "Objective":
        temperature, gamma, kd_ratio, beta, softcap, scale = scalars.tolist()
        names = WEIGHTINGS[weighting], DIVERGENCES[divergence]
        return cls(temperature, gamma, kd_ratio, beta, softcap, scale, *names, ignore_index)


class TeacherTerm(NamedTuple):
    """The part of the loss that depends on the teacher, for u = z/T: values per token, gradient on demand."""

    divergence: Tensor
    entropy: Tensor
    support: Tensor  # S, the outcomes that the entropy is over
    gradient: Callable[[], Tensor]  # ∂divergence/∂u, (N, V)


class TokenLoss(NamedTuple):
    """Per-token loss (N,), statistics (4, N), and the gradient of Σ coefficient·loss for coefficients (N,)."""

    losses: Tensor
    stats: Tensor
    gradient: Callable[[Tensor], Tensor]
    empty_gradient: Tensor


def valid_tokens(student: Tensor, labels: Tensor | None, token_mask: Tensor | None, ignore_index: int) -> Tensor:
    """(N,) bool: neither ignored by label nor masked out."""
    valid = torch.ones(len(student), dtype=torch.bool, device=student.device)
    if labels is not None:
        valid &= labels != ignore_index
    if token_mask is not None:
        valid &= token_mask
    return valid


def model_logits(logits: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """z = cap·tanh(scale·x/cap), or scale·x without a cap, in the accumulation dtype; and ∂z/∂x."""
    z = logits.to(accumulate_dtype(logits.dtype))
    if scale != 1:
        z = z * scale
    if softcap == 0:
        return z, scale
    bounded = torch.tanh(z / softcap)
    return softcap * bounded, scale * (1 - bounded * bounded)


def _coefficients(term: TeacherTerm, options: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """The weight of each token, and the factors of T²·D and of CE in its loss."""
    ratio = (term.entropy / term.support.clamp(min=2).to(term.entropy.dtype).log()).clamp(0, 1)
    weight = torch.ones_like(ratio)
    if options.weighting == "mix":
        return weight, ratio, 1 - ratio
    if options.weighting != "none" and options.gamma != 0:
        weight = 1 + options.gamma * (ratio if options.weighting == "entropy" else 1 - ratio)
    return weight, weight * options.kd_ratio, weight * (1 - options.kd_ratio)


def token_loss(
    student: Tensor,
    measure: Callable[[Tensor], TeacherTerm],
    labels: Tensor | None,
    valid: Tensor,
    options: Objective,
    columns: Columns = WHOLE,
) -> TokenLoss:
    """The loss of each token of `student` (N, V); `measure(u)` gives the teacher's part for u = z/T.

    `student` may hold some `columns` of the vocabulary only; `measure`'s values are then those of all.
    """
    z, slope = model_logits(student, options.student_scale, options.student_softcap)
    temperature = options.temperature
    term = measure(z / temperature)
    weight, kd, hard = _coefficients(term, options)
    losses = weighted(kd * temperature**2, term.divergence)
    cross_entropy = torch.zeros_like(weight)
    target = None
    if labels is not None:
        target = torch.where(valid, labels, 0)[:, None]
        largest, log_sum = columns.normaliser(z)
        cross_entropy = (log_sum - (columns.gather(z, target) - largest))[:, 0]
        losses = losses + weighted(hard, cross_entropy)

    def gradient(coefficient: Tensor) -> Tensor:
        grad = torch.zeros_like(z)
        if options.weighting == "mix" or options.kd_ratio != 0:
            grad += weighted((kd * temperature)[:, None], term.gradient())
        if target is not None and (options.weighting == "mix" or options.kd_ratio != 1):
            residual = columns.scatter_add(columns.softmax(z), target, z.new_full(target.shape, -1.0))
            grad += weighted(hard[:, None], residual)
        grad *= slope * coefficient[:, None]
        return torch.where(valid[:, None], grad, 0.0).to(student.dtype)

    stats = torch.stack((term.divergence, term.entropy, cross_entropy, weight))
    losses, stats = torch.where(valid, losses, 0.0), torch.where(valid, stats, 0.0)
    return TokenLoss(losses, stats, gradient, student.new_empty(0))


def denominator(stats: Tensor, reduction: str, num_items: Tensor | None) -> Tensor:
    """What the sum of the token losses is divided by: Σw or `num_items` for mean, else 1; 0 counts as 1."""
    if reduction != "mean":
        return stats.new_ones(())
    total = stats[3].sum() if num_items is None else num_items.to(stats)
    return torch.where(total == 0, 1.0, total)


def forward(
    tokens: TokenLoss, reduction: int, num_items: Tensor | None, need_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, stats, gradient for an incoming gradient of 1) of a loss operator; the gradient is empty if not needed."""
    name = REDUCTIONS[reduction]
    if name == "none":
        return tokens.losses, tokens.stats, tokens.empty_gradient
    divisor = denominator(tokens.stats, name, num_items)
    coefficient = (1 / divisor).expand_as(tokens.losses)
    gradient = tokens.gradient(coefficient) if need_gradient else tokens.empty_gradient
    return tokens.losses.sum() / divisor, tokens.stats, gradient
