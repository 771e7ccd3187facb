"""linear_entropy_kl, value and gradient, against TRL and eager; floor: its matrix products."""

import pytest
import torch
import torch.nn.functional as F
from heads import SIZES, make, products
from measure import measure

import e3kernels as e3k
from e3kernels.textbook import entropy_kl as textbook
from e3pruner.profiling.operations.gradients import errors_of, gradient_of


def eager(hidden, weight, teacher_hidden, teacher_weight):
    return textbook(F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight))


def trl(hidden, weight, teacher_hidden, teacher_weight):
    """Unweighted: TRL gives neither the teacher's entropy nor weights."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # seconds that other suites need not wait

    return ChunkedDivergenceFunction.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, 0.0)[0].mean()


@pytest.mark.parametrize("provider", ["floor", "e3", "eager", "trl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_frozen_heads(turns, provider, size, dtype):
    hidden, *rest = make(*size, dtype)
    hidden = hidden.detach()
    errors = None
    if provider == "floor":
        call = products(hidden, *rest)
    else:
        loss = {"e3": e3k.linear_entropy_kl, "eager": eager, "trl": trl}[provider]
        if provider != "trl":  # its loss is another
            few = (rest[0], rest[1][:16], rest[2])
            exact = tuple(tensor.double() for tensor in few)
            errors = errors_of(lambda h: loss(h, *few), lambda h: eager(h, *exact), hidden[:16])
        hidden.requires_grad_()
        call = gradient_of(lambda: loss(hidden, *rest), hidden)
    width, vocabulary, rows = size
    measure(
        turns, call, op="linear_entropy_kl", provider=provider, phase="value+grad", dtype=dtype,
        sizes={"N": rows, "H": width, "V": vocabulary}, work=6.0 * rows * width * vocabulary, unit="FLOP",
        errors=errors,
    )  # fmt: skip


@pytest.mark.parametrize("provider", ["floor", "e3", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_head_that_learns(turns, provider, size, dtype):
    hidden, weight, *teacher = make(*size, dtype)
    student = tuple(tensor.detach().requires_grad_() for tensor in (hidden, weight))
    if provider == "floor":
        call = products(hidden, weight, *teacher, learns=True)
    else:
        loss = {"e3": e3k.linear_entropy_kl, "eager": eager}[provider]
        call = gradient_of(lambda: loss(*student, *teacher), *student)
    width, vocabulary, rows = size
    measure(
        turns, call, op="linear_entropy_kl", provider=provider, phase="value+head gradient", dtype=dtype,
        sizes={"N": rows, "H": width, "V": vocabulary}, work=8.0 * rows * width * vocabulary, unit="FLOP",
    )  # fmt: skip
