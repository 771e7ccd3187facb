"""The operations in textbook PyTorch, in the dtype of their inputs: what users write without this library, and what the
kernels may be neither slower nor less exact than."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What one rounding to the dtype, and sums in fp32 (fp64), may cost relative to the largest value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _per_token(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, log_target=True, reduction="none").sum(-1)

    if divergence == "forward":
        return kl(log_p, log_q)
    if divergence == "reverse":
        return kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def _cap(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    logits = logits if scale == 1 else logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _weighted(
    divergence: Tensor,
    log_p: Tensor,
    logits: Tensor,
    labels: Tensor | None,
    token_mask: Tensor | None,
    *,
    temperature: float = 1.0,
    weighting: str = "entropy",
    gamma: float = 1.0,
    kd_ratio: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """(w·ℓ, w) of divergences (N,) from teachers of log-probabilities `log_p` (N, S); 0 where nothing is valid."""
    valid, hard = torch.ones_like(divergence, dtype=torch.bool), None
    if labels is not None:
        valid = labels != ignore_index
        hard = F.cross_entropy(logits, labels, reduction="none", ignore_index=ignore_index)
    if token_mask is not None:
        valid = valid & token_mask
    mixed = weighting == "mix"
    ratio = _entropy_ratio(log_p) if mixed else kd_ratio
    weight = _entropy_weight(log_p, "none" if mixed else weighting, gamma)
    token = ratio * temperature**2 * divergence
    if hard is not None:
        token = token + (1 - ratio) * hard
    return weight * token * valid, weight * valid


def _reduced(loss: Tensor, weight: Tensor, reduction: str, num_items: int | None) -> Tensor:
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / (weight.sum() if num_items is None else num_items)


def _entropy_ratio(log_p: Tensor) -> Tensor:
    """H/log S (N,) of log-probabilities (N, S)."""
    entropy: Tensor = torch.special.entr(log_p.detach().exp()).sum(-1)
    return entropy / math.log(log_p.shape[-1]) if log_p.shape[-1] > 1 else 0 * entropy


def _entropy_weight(log_p: Tensor, weighting: str, gamma: float) -> Tensor:
    """w (N,) of the teacher's log-probabilities (N, S)."""
    if weighting == "none":
        return torch.ones_like(log_p[..., 0])
    ratio = _entropy_ratio(log_p)
    return 1 + gamma * (ratio if weighting == "entropy" else 1 - ratio)


def entropy_kl_tokens(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    token_mask: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """(w·ℓ, w) of every token, (N,) each, of (N, V) logits."""
    z, zt = _cap(student, student_softcap, student_scale), _cap(teacher, teacher_softcap, teacher_scale)
    log_p, log_q = F.log_softmax(zt / temperature, -1), F.log_softmax(z / temperature, -1)
    value = _per_token(log_p, log_q, divergence, beta)
    return _weighted(value, log_p, z, labels, token_mask, temperature=temperature, **rest)


def topk_kl_tokens(
    student: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    labels: Tensor | None = None,
    *,
    token_mask: Tensor | None = None,
    tail: str = "bucket",
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    student_softcap: float | None = None,
    student_scale: float = 1.0,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """(w·ℓ, w) of every token, (N,) each, of (N, V) logits and (N, k) log-probabilities and ids."""
    z = _cap(student, student_softcap, student_scale)
    log_p = teacher_logprobs.to(z.dtype)
    log_q = F.log_softmax(z / temperature, -1).gather(-1, teacher_ids)
    stored = F.log_softmax(log_p, -1)
    if tail == "renorm":
        log_p, log_q = stored, F.log_softmax(log_q, -1)
    elif tail == "bucket":
        log_p = torch.cat((log_p, (1 - log_p.exp().sum(-1, keepdim=True)).log()), -1)
        log_q = torch.cat((log_q, (1 - log_q.exp().sum(-1, keepdim=True)).log()), -1)
    value = _per_token(log_p, log_q, divergence, beta)
    return _weighted(value, stored, z, labels, token_mask, temperature=temperature, **rest)


def entropy_kl(*tensors: Any, reduction: str = "mean", num_items: int | None = None, **options: Any) -> Tensor:
    """The dense loss; arguments as of `entropy_kl_tokens`."""
    return _reduced(*entropy_kl_tokens(*tensors, **options), reduction, num_items)


def topk_kl(*tensors: Any, reduction: str = "mean", num_items: int | None = None, **options: Any) -> Tensor:
    """The sparse loss; arguments as of `topk_kl_tokens`."""
    return _reduced(*topk_kl_tokens(*tensors, **options), reduction, num_items)


def gumbel_topk(logits: Tensor, k: int, tau: float, relaxation: str) -> Tensor:
    """Straight-through mask of k ones with torch's own random numbers."""
    s = logits - (-torch.rand_like(logits).log()).log()
    if relaxation == "softmax":
        p = k * torch.softmax(s / tau, -1)
    else:
        low, high = s.min() - 10 * tau, s.max() + 10 * tau
        for _ in range(30):
            middle = (low + high) / 2
            above = torch.sigmoid((s - middle) / tau).sum() > k
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        p = torch.sigmoid((s - (low + high).detach() / 2) / tau)
    mask = torch.zeros_like(s).scatter_(-1, s.topk(k).indices, 1.0)
    return mask + p - p.detach()


def gated_residual(hidden: Tensor, branch_out: Tensor, gate: Tensor) -> Tensor:
    """h + m·(f − h)."""
    return (hidden + gate * (branch_out - hidden)).to(hidden.dtype)
