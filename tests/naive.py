"""The losses in textbook PyTorch, in the dtype of their inputs: what ours may not be worse than."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# What one rounding to the dtype, and sums in fp32 (fp64), may cost relative to the largest value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _share(entropy: Tensor, support: int) -> Tensor:
    return entropy.detach() / math.log(support) if support > 1 else 0 * entropy.detach()


def _per_token(log_p: Tensor, log_q: Tensor, divergence: str, beta: float, share: Tensor) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, log_target=True, reduction="none").sum(-1)

    if divergence == "forward":
        return kl(log_p, log_q)
    if divergence == "reverse":
        return kl(log_q, log_p)
    if divergence == "adaptive":
        return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def _cap(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _combine(
    divergence: Tensor,
    entropy: Tensor,
    support: int,
    logits: Tensor,
    labels: Tensor | None,
    token_mask: Tensor | None,
    *,
    temperature: float = 1.0,
    weighting: str = "entropy",
    gamma: float = 1.0,
    kd_ratio: float = 1.0,
    ignore_index: int = -100,
    num_items: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    ratio = _share(entropy, support)
    valid = torch.ones_like(divergence, dtype=torch.bool)
    hard = torch.zeros_like(divergence)
    if labels is not None:
        valid = labels != ignore_index
        hard = F.cross_entropy(logits, labels, reduction="none", ignore_index=ignore_index)
    if token_mask is not None:
        valid = valid & token_mask
    weight = {
        "none": torch.ones_like(ratio),
        "entropy": 1 + gamma * ratio,
        "inverse": 1 + gamma * (1 - ratio),
        "mix": torch.ones_like(ratio),
    }[weighting]
    if weighting == "mix":
        token = ratio * temperature**2 * divergence + (1 - ratio) * hard
    else:
        token = weight * (kd_ratio * temperature**2 * divergence + (1 - kd_ratio) * hard)
    token = token * valid
    if reduction == "none":
        return token
    total = token.sum()
    if reduction == "sum":
        return total
    return total / ((weight * valid).sum() if num_items is None else num_items)


def entropy_kl(
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
    **rest: object,
) -> Tensor:
    """The dense loss of (N, V) logits."""
    z, zt = _cap(student, student_softcap, student_scale), _cap(teacher, teacher_softcap, teacher_scale)
    log_p, log_q = F.log_softmax(zt / temperature, -1), F.log_softmax(z / temperature, -1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    value = _per_token(log_p, log_q, divergence, beta, _share(entropy, z.shape[-1]))
    return _combine(value, entropy, z.shape[-1], z, labels, token_mask, temperature=temperature, **rest)


def topk_kl(
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
    **rest: object,
) -> Tensor:
    """The sparse loss of (N, V) logits and (N, k) log-probabilities and ids."""
    z = _cap(student, student_softcap, student_scale)
    log_p = teacher_logprobs.to(z.dtype)
    log_q = F.log_softmax(z / temperature, -1).gather(-1, teacher_ids)
    stored = F.log_softmax(log_p, -1)
    if tail == "renorm":
        log_p, log_q = stored, F.log_softmax(log_q, -1)
    elif tail == "bucket":
        log_p = torch.cat((log_p, (1 - log_p.exp().sum(-1, keepdim=True)).log()), -1)
        log_q = torch.cat((log_q, (1 - log_q.exp().sum(-1, keepdim=True)).log()), -1)
    entropy = torch.special.entr(stored.exp()).sum(-1)
    value = _per_token(log_p, log_q, divergence, beta, _share(entropy, stored.shape[-1]))
    return _combine(value, entropy, stored.shape[-1], z, labels, token_mask, temperature=temperature, **rest)
