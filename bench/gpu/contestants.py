"""Who computes what: our kernels, eager PyTorch, torch.compile, Liger and TRL, each forward and backward."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import e3kernels as e3k
from e3kernels import textbook

Step = Callable[[], Any]


class Contest(NamedTuple):
    """Contestants by name, and the least that any of them must move and compute; 0 for what does not bind."""

    prepare: Callable[[], dict[str, Step]]
    bytes: float = 0
    operations: float = 0


def _naive(student: Tensor, teacher: Tensor) -> Tensor:
    return textbook.entropy_kl(student.float(), teacher.float(), weighting="none")


def _training(loss: Callable[..., Tensor], *leaves: Tensor) -> Step:
    """One forward and backward pass; the gradients are dropped each time."""

    def step() -> None:
        torch.autograd.grad(loss(*leaves), leaves)

    return step


def entropy_kl(rows: int, vocabulary: int, device: str) -> dict[str, Step]:
    """Forward KL of bf16 logits."""
    student, teacher = (torch.randn(rows, vocabulary, device=device, dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()

    def liger(z: Tensor) -> Tensor:
        from liger_kernel.ops.kl_div import LigerKLDivLossFunction

        log_p, log_q = teacher.float().log_softmax(-1), z.float().log_softmax(-1)
        return LigerKLDivLossFunction.apply(log_q, log_p, "batchmean", True, 1e-10)

    compiled = torch.compile(_naive, dynamic=False)
    return {
        "e3kernels, weighted": _training(lambda z: e3k.entropy_kl(z, teacher), student),
        "e3kernels, unweighted": _training(lambda z: e3k.entropy_kl(z, teacher, weighting="none"), student),
        "eager": _training(lambda z: _naive(z, teacher), student),
        "torch.compile": _training(lambda z: compiled(z, teacher), student),
        "liger": _training(liger, student),
    }


def topk_kl(rows: int, vocabulary: int, device: str) -> dict[str, Step]:
    """Ten stored log-probabilities per token; nobody else has the tail event."""
    student = torch.randn(rows, vocabulary, device=device, dtype=torch.bfloat16, requires_grad=True)
    stored, ids = torch.randn(rows, vocabulary, device=device).log_softmax(-1).topk(10)

    def naive(z: Tensor) -> Tensor:
        return textbook.topk_kl(z.float(), stored, ids, weighting="none")

    compiled = torch.compile(naive, dynamic=False)
    return {
        "e3kernels": _training(lambda z: e3k.topk_kl(z, stored, ids), student),
        "eager": _training(naive, student),
        "torch.compile": _training(compiled, student),
    }


def linear_entropy_kl(rows: int, width: int, vocabulary: int, device: str) -> dict[str, Step]:
    """Forward KL from bf16 hidden states; gradients of hidden states and head."""
    hidden, teacher = (torch.randn(rows, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight, fixed = (torch.randn(vocabulary, width, device=device, dtype=torch.bfloat16) / width**0.5 for _ in range(2))
    hidden.requires_grad_()
    weight.requires_grad_()

    def trl(h: Tensor, w: Tensor) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        return ChunkedDivergenceFunction.apply(h, w, None, teacher, fixed, None, 0.0)[0].mean()

    def liger(h: Tensor, w: Tensor) -> Tensor:
        from liger_kernel.ops.fused_linear_kl_div import LigerFusedLinearKLDivFunction

        with torch.no_grad():
            target = (teacher @ fixed.t()).float().softmax(-1).to(torch.bfloat16)
        return LigerFusedLinearKLDivFunction.apply(h, w, target)

    return {
        "e3kernels": _training(lambda h, w: e3k.linear_entropy_kl(h, w, teacher, fixed), hidden, weight),
        "eager": _training(lambda h, w: _naive(h @ w.t(), teacher @ fixed.t()), hidden, weight),
        "trl": _training(trl, hidden, weight),
        "liger": _training(liger, hidden, weight),
    }


def gated_residual(tokens: int, width: int, device: str) -> dict[str, Step]:
    """One gate for the whole tensor."""
    hidden, branch = (
        torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)
    )
    gate = torch.rand((), device=device, requires_grad=True)
    incoming = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)

    def training(function: Callable[..., Tensor]) -> Step:
        leaves = (hidden, branch, gate)
        return lambda: torch.autograd.grad(function(*leaves), leaves, incoming)

    compiled = torch.compile(textbook.gated_residual, dynamic=False)
    return {
        "e3kernels": training(e3k.gated_residual),
        "eager": training(textbook.gated_residual),
        "torch.compile": training(compiled),
    }


def gumbel_topk(layers: int, device: str) -> dict[str, Step]:
    """One mask of a search step; eager is the reference."""
    theta = torch.randn(layers, device=device, requires_grad=True)

    def sample(z: Tensor) -> Tensor:
        return e3k.gumbel_topk(z, layers * 3 // 4, tau=0.5, seed=1, step=2).mask.sum()

    def reference(z: Tensor) -> Tensor:
        with e3k.use_backend("reference"):
            return sample(z)

    return {"e3kernels": _training(sample, theta), "eager": _training(reference, theta)}


def contests(device: str, small: bool = False) -> dict[str, Contest]:
    """Each comparison by name; `prepare` allocates its tensors. Small ones are for a rehearsal."""
    dense = [(8, 1024)] if small else [(4096, 32000), (4096, 128256)]
    linear = [(8, 64, 1024)] if small else [(4096, 576, 49152), (8192, 4096, 128256)]
    tokens, width = (8, 64) if small else (16384, 4096)
    # Read for the statistics, read for the gradient, written: two bytes each, of the student and of a dense teacher.
    found = {
        f"entropy_kl {n}x{v}": Contest(lambda n=n, v=v: entropy_kl(n, v, device), bytes=10 * n * v) for n, v in dense
    }
    n, v = dense[-1]
    found[f"topk_kl {n}x{v}"] = Contest(lambda: topk_kl(n, v, device), bytes=6 * n * v)
    # Products of student and teacher, and of the gradients of hidden states and head.
    found |= {
        f"linear_entropy_kl {n}x{h}x{v}": Contest(
            lambda n=n, h=h, v=v: linear_entropy_kl(n, h, v, device), operations=8 * n * h * v
        )
        for n, h, v in linear
    }
    # Three tensors forward, five backward.
    found[f"gated_residual {tokens}x{width}"] = Contest(
        lambda: gated_residual(tokens, width, device), bytes=16 * tokens * width
    )
    found["gumbel_topk 64"] = Contest(lambda: gumbel_topk(64, device))
    if not small:
        return found
    return {name: Contest(lambda contest=contest: _without_compiler(contest)) for name, contest in found.items()}


def _without_compiler(contest: Contest) -> dict[str, Step]:
    return {name: step for name, step in contest.prepare().items() if name != "torch.compile"}
