"""Small calls of all six operations, for tests of what they have in common."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import e3kernels as e3k

# Where each operation's differentiable inputs stand among its positional arguments.
LOSSES = ("entropy_kl", "topk_kl", "linear_entropy_kl", "linear_topk_kl")
OPERATIONS = (*LOSSES, "gumbel_topk", "gated_residual")
TOKENS, VOCABULARY, WIDTH = 3, 7, 5


class Call(NamedTuple):
    """An operation as a function of its differentiable inputs alone, and these inputs."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]

    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(tensor.clone().requires_grad_() for tensor in self.inputs)

    def total(self, *inputs: Tensor) -> Tensor:
        """The output weighted by a ramp, so that no two of its entries have the same gradient."""
        output = self.function(*inputs)
        return (output * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view(output.shape)).sum()

    def gradients(self) -> tuple[Tensor, ...]:
        leaves = self.leaves()
        return torch.autograd.grad(self.total(*leaves), leaves)


def arguments(operation: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """The operation's arguments by name, every tensor contiguous."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    if operation == "gumbel_topk":
        return {"logits": random(TOKENS, VOCABULARY), "k": 3, "tau": 0.7, "seed": 5, "step": 2}
    if operation == "gated_residual":
        hidden, branch_out = random(TOKENS, VOCABULARY), random(TOKENS, VOCABULARY)
        return {"hidden": hidden, "branch_out": branch_out, "gate": random(TOKENS, 1).sigmoid()}
    result: dict[str, Any] = {"kd_ratio": 0.6, "labels": torch.tensor([2, -100, 5])}
    logits = random(TOKENS, VOCABULARY)
    stored = dict(
        zip(("teacher_logprobs", "teacher_ids"), random(TOKENS, VOCABULARY).log_softmax(-1).topk(3), strict=True)
    )
    student = {"student_logits": logits}
    teacher: dict[str, Tensor] = stored if "topk" in operation else {"teacher_logits": random(TOKENS, VOCABULARY)}
    if operation.startswith("linear"):
        student = {"student_hidden": random(TOKENS, WIDTH), "student_weight": random(VOCABULARY, WIDTH)}
        result["student_bias"] = random(VOCABULARY)
        if operation == "linear_entropy_kl":
            teacher = {"teacher_hidden": random(TOKENS, WIDTH), "teacher_weight": random(VOCABULARY, WIDTH)}
            result["teacher_bias"] = random(VOCABULARY)
    return student | teacher | result


def differentiable(operation: str) -> tuple[str, ...]:
    """The names of the arguments that get a gradient."""
    if operation == "gumbel_topk":
        return ("logits",)
    if operation == "gated_residual":
        return ("hidden", "branch_out", "gate")
    return ("student_hidden", "student_weight", "student_bias") if operation[:6] == "linear" else ("student_logits",)


def apply(operation: str, **call: Any) -> Tensor:
    """The operation's differentiable output."""
    result = getattr(e3k, operation)(**call)
    return result.probs if operation == "gumbel_topk" else result


def small_call(operation: str, dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    """The operation on contiguous tensors of a few elements."""
    call, names = arguments(operation, dtype) | options, differentiable(operation)
    rest = {name: value for name, value in call.items() if name not in names}

    def function(*inputs: Tensor) -> Tensor:
        return partial(apply, operation)(**dict(zip(names, inputs, strict=True)), **rest)

    return Call(function, tuple(call[name] for name in names))
