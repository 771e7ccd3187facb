"""Reference `gumbel_topk`: scores s = θ + κ·g with Gumbel noise g, the mask of the k largest, and a relaxation of it.

    threshold    p = σ((s − c)/τ), c solved so that Σp = k      ∂p_i/∂s_j = a_i/τ·(δ_ij − a_j/Σa), a = p(1 − p)
    softmax      p = k·softmax(s/τ)
    successive   p = Σ_j a^j, a^j = softmax(s^j/τ), s^(j+1) = s^j + log(1 − a^j)     (Xie & Ermon, arXiv 1901.10517)

Scores and relaxations are computed in fp64 for every dtype of the logits.
"""

import torch
from torch import Tensor

from e3kernels.contract import RELAXATIONS
from e3kernels.reference.fixed_log import fixed_log
from e3kernels.reference.philox import uniform

# Newton steps, each kept inside a bracket of width τ·log(4k(L − k)); about ten reach the last bit.
_SOLVER_STEPS = 24
# An infinite score counts as this many τ beyond the farthest finite one: σ and exp saturate exactly there.
_INFINITE = 1000.0


def scores(logits: Tensor, noise_scale: float, seed: int, step: int) -> Tensor:
    """s = θ + κ·g in fp64, (rows, L), g = −log(−log u)."""
    theta = logits.double()
    if noise_scale == 0:
        return theta
    noise = -fixed_log(-fixed_log(uniform(theta.shape[0], theta.shape[1], seed, step, theta.device)))
    return theta + noise * noise_scale


def _finite(s: Tensor, tau: float) -> Tensor:
    finite = s.isfinite()
    largest = torch.where(finite, s, -torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    smallest = torch.where(finite, s, torch.inf).amin(-1, keepdim=True).nan_to_num(posinf=0.0)
    s = torch.where(s == torch.inf, largest + _INFINITE * tau, s)
    return torch.where(s == -torch.inf, smallest - _INFINITE * tau, s)


def _threshold(s: Tensor, k: int, tau: float) -> Tensor:
    """Solve Σσ(x − d) = k for d, with x in units of τ around the middle of the k-th and (k+1)-th largest score.

    At the root 1 − p of the k-th is at most (L − k) times p of the (k+1)-th, and that at most k times the former, which
    bounds d to [−log 2k, log 2(L − k)] however far the scores lie apart.
    """
    length = s.shape[-1]
    ordered = s.sort(-1, descending=True).values
    x = (s - (ordered[:, k - 1, None] / 2 + ordered[:, k, None] / 2)) / tau
    d = torch.zeros_like(x[:, :1])
    low = torch.full_like(d, 2 * k).log().neg()
    high = torch.full_like(d, 2 * (length - k)).log()
    for _ in range(_SOLVER_STEPS):
        p = torch.sigmoid(x - d)
        excess = p.sum(-1, keepdim=True) - k
        low, high = torch.where(excess > 0, d, low), torch.where(excess > 0, high, d)
        newton = d + excess / (p * (1 - p)).sum(-1, keepdim=True)
        inside = (newton >= low) & (newton <= high)
        d = torch.where(inside, newton, (low + high) / 2)
    return torch.sigmoid(x - d)


def _successive_steps(s: Tensor, k: int, tau: float) -> list[Tensor]:
    steps = []
    for _ in range(k):
        a = torch.softmax(s / tau, -1)
        s = s + torch.log1p(-a)
        steps.append(a)
    return steps


def _relax(s: Tensor, k: int, tau: float, relaxation: str) -> Tensor:
    if relaxation == "threshold":
        return _threshold(s, k, tau)
    if relaxation == "softmax":
        return k * torch.softmax(s / tau, -1)
    return torch.stack(_successive_steps(s, k, tau)).sum(0)


def gumbel_topk(
    logits: Tensor, scalars: Tensor, k: int, seed: int, step: int, relaxation: int
) -> tuple[Tensor, Tensor]:
    """Kernel of `e3::gumbel_topk.reference`."""
    tau, noise_scale = scalars.tolist()
    rows = logits.reshape(-1, logits.shape[-1])
    s = scores(rows, noise_scale, seed, step)
    kept = s.sort(stable=True, dim=-1, descending=True).indices[:, :k]
    mask = torch.zeros_like(s).scatter_(-1, kept, 1.0)
    constant = k in (0, rows.shape[-1])
    probs = mask.clone() if constant else _relax(_finite(s, tau), k, tau, RELAXATIONS[relaxation])
    undefined = s.isnan().any(-1, keepdim=True)
    mask, probs = (result.masked_fill(undefined, torch.nan).to(logits.dtype) for result in (mask, probs))
    return mask.reshape(logits.shape), probs.reshape(logits.shape)


def _softmax_backward(a: Tensor, grad: Tensor) -> Tensor:
    return a * (grad - (a * grad).sum(-1, keepdim=True))


def _threshold_backward(p: Tensor, grad: Tensor) -> Tensor:
    a = p * (1 - p)
    total = a.sum(-1, keepdim=True)
    mean = (a * grad).sum(-1, keepdim=True) / torch.where(total == 0, 1.0, total)
    return a * (grad - mean)


def _successive_backward(steps: list[Tensor], grad: Tensor, tau: float) -> Tensor:
    """Reverse sweep: `state` is the gradient with respect to s^(j+1) on entry and to s^j on exit."""
    state = torch.zeros_like(grad)
    for a in reversed(steps):
        rest = 1 - a
        through_rest = torch.where(rest > 0, state / rest, 0.0)
        state = state + _softmax_backward(a, grad - through_rest) / tau
    return state


def gumbel_topk_backward(
    grad: Tensor, logits: Tensor, probs: Tensor, scalars: Tensor, k: int, seed: int, step: int, relaxation: int
) -> Tensor:
    """Kernel of `e3::gumbel_topk_backward.reference`: the gradient of `probs`, 0 for k = 0 and k = L."""
    tau, noise_scale = scalars.tolist()
    length = logits.shape[-1]
    if k in (0, length):
        return torch.zeros_like(logits, memory_format=torch.contiguous_format)
    rows, incoming, p = (tensor.reshape(-1, length).double() for tensor in (logits, grad, probs))
    name = RELAXATIONS[relaxation]
    result: Tensor
    if name == "threshold":
        result = _threshold_backward(p, incoming) / tau
    elif name == "softmax":
        result = k * _softmax_backward(p / k, incoming) / tau
    else:
        s = _finite(scores(rows, noise_scale, seed, step), tau)
        result = _successive_backward(_successive_steps(s, k, tau), incoming, tau)
    return result.to(logits.dtype).reshape(logits.shape)
