"""entropy_kl, value and gradient, against the textbook loss eager and compiled; floor: torch.add on such tensors."""

from functools import cache, partial

import pytest
import torch
from measure import measure

import e3kernels as e3k
from e3kernels.textbook import entropy_kl as textbook
from e3pruner.profiling.operations.gradients import errors_of, gradient_of

# Without weights the gradient's denominator is known beforehand: no teacher logit is read twice.
UNWEIGHTED = "e3 weighting=none"
LOSSES = {"e3": e3k.entropy_kl, UNWEIGHTED: partial(e3k.entropy_kl, weighting="none"), "eager": textbook}
DTYPES = (torch.float32, torch.bfloat16)
PEERS = [(512, 49_152)]
SIZES = [
    *PEERS,
    (64, 49_152),
    (2048, 49_152),
    (8192, 49_152),
    (64, 128_256),
    (512, 128_256),
    (64, 151_936),
    (512, 151_936),
]


def make(rows, vocabulary, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.empty(rows, vocabulary).normal_(0, 3, generator=generator).to(dtype) for _ in range(2)]


@cache
def compiled():
    return torch.compile(textbook)


def provider_call(provider, student, teacher):
    if provider == "floor":
        out = torch.empty_like(student)
        return lambda: torch.add(student, teacher, out=out)
    loss = compiled() if provider == "compile" else LOSSES[provider]
    student.requires_grad_()
    return gradient_of(lambda: loss(student, teacher), student)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "provider"),
    [(size, provider) for size in SIZES for provider in ("floor", "e3")]
    + [(size, provider) for size in PEERS for provider in (UNWEIGHTED, "compile", "eager")],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]}x{value[1]}",
)
def test_value_and_gradient(turns, size, provider, dtype):
    student, teacher = make(*size, dtype)
    errors = None
    if size in PEERS and provider not in ("floor", UNWEIGHTED):
        loss = LOSSES.get(provider, textbook)
        few = teacher[:16]
        errors = errors_of(lambda z: loss(z, few), lambda z: textbook(z, few.double()), student[:16])
    measure(
        turns, provider_call(provider, student, teacher), op="entropy_kl", provider=provider, phase="value+grad",
        dtype=dtype, sizes={"N": size[0], "V": size[1]}, work=3 * student.numel() * student.element_size(), unit="B",
        errors=errors,
    )  # fmt: skip
