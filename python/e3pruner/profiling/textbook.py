"""The losses as a textbook writes them, in the dtype of their inputs: what users run without this library."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def entropy_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Σw·KL/Σw with w = 1 + H/log V, of (N, V) logits."""
    log_p, log_q = F.log_softmax(teacher, -1), F.log_softmax(student, -1)
    p = log_p.exp()
    divergence = (p * (log_p - log_q)).sum(-1)
    weight = 1 - (p * log_p).sum(-1) / math.log(student.shape[-1])
    return (weight * divergence).sum() / weight.sum()


def topk_kl(student: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor) -> Tensor:
    """The same over k stored ids and a bucket for all others."""
    log_q = F.log_softmax(student, -1).gather(-1, teacher_ids)
    log_p = teacher_logprobs.to(log_q.dtype)
    stored = F.log_softmax(log_p, -1)
    weight = 1 - (stored.exp() * stored).sum(-1) / math.log(teacher_ids.shape[-1])
    log_p, log_q = (torch.cat((x, (1 - x.exp().sum(-1, keepdim=True)).log()), -1) for x in (log_p, log_q))
    return (weight * (log_p.exp() * (log_p - log_q)).sum(-1)).sum() / weight.sum()


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


def distillation(student: Tensor, teacher: Tensor, labels: Tensor, kd_ratio: float) -> tuple[Tensor, Tensor]:
    """(Σw·(λ·KL + (1 − λ)·CE), the w of every token) of (..., V) logits with w = 1 + H/log V and no padding."""
    log_p, log_q = F.log_softmax(teacher, -1), F.log_softmax(student, -1)
    p = log_p.exp()
    divergence = (p * (log_p - log_q)).sum(-1)
    cross_entropy = -log_q.gather(-1, labels[..., None])[..., 0]
    weight = 1 - (p * log_p).sum(-1) / math.log(student.shape[-1])
    return (weight * (kd_ratio * divergence + (1 - kd_ratio) * cross_entropy)).sum(), weight
