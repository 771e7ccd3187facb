"""topk_kl, value and gradient, against the textbook loss; floor: one read and one write of the student's logits."""

import pytest
import torch
from measure import measure

import e3kernels as e3k
from e3kernels.textbook import topk_kl as textbook
from e3pruner.profiling.operations.gradients import errors_of, gradient_of

SIZES = [(512, 49_152, 10), (512, 151_936, 10)]


def make(rows, vocabulary, k, dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.empty(rows, vocabulary).normal_(0, 3, generator=generator) for _ in range(2))
    logprobs, ids = teacher.log_softmax(-1).topk(k)
    return student.to(dtype), logprobs, ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("provider", ["floor", "e3", "eager"])
def test_value_and_gradient(turns, size, provider, dtype):
    student, logprobs, ids = make(*size, dtype)
    loss = e3k.topk_kl if provider == "e3" else textbook
    errors = None
    if provider == "floor":
        out = torch.empty_like(student)
        call = lambda: out.copy_(student)  # noqa: E731
    else:
        few = logprobs[:16], ids[:16]
        exact = few[0].double(), few[1]
        errors = errors_of(lambda z: loss(z, *few), lambda z: textbook(z, *exact), student[:16])
        student.requires_grad_()
        call = gradient_of(lambda: loss(student, logprobs, ids), student)
    measure(
        turns, call, op="topk_kl", provider=provider, phase="value+grad", dtype=dtype,
        sizes=dict(zip(("N", "V", "k"), size, strict=True)), work=2 * student.numel() * student.element_size(),
        unit="B", errors=errors,
    )  # fmt: skip
