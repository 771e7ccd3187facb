"""linear_topk_kl with a frozen head, value and gradient, against eager; floor: its GEMMs."""

import pytest
import torch
import torch.nn.functional as F
from heads import SIZES, make, products
from measure import measure

import e3kernels as e3k
from e3kernels.textbook import topk_kl as textbook
from e3pruner.profiling.operations.gradients import errors_of, gradient_of


def eager(hidden, weight, logprobs, ids):
    return textbook(F.linear(hidden, weight), logprobs, ids)


@pytest.mark.parametrize("provider", ["floor", "e3", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradient(turns, provider, dtype):
    width, vocabulary, rows = SIZES[0]
    hidden, weight, *_ = make(*SIZES[0], dtype)
    hidden = hidden.detach()
    logprobs, ids = torch.randn(rows, vocabulary).mul_(3).log_softmax(-1).topk(10)
    errors = None
    if provider == "floor":
        call = products(hidden, weight)
    else:
        loss = e3k.linear_topk_kl if provider == "e3" else eager
        few = (logprobs[:16], ids[:16])
        exact = (weight.double(), few[0].double(), few[1])
        errors = errors_of(lambda h: loss(h, weight, *few), lambda h: eager(h, *exact), hidden[:16])
        hidden.requires_grad_()
        call = gradient_of(lambda: loss(hidden, weight, logprobs, ids), hidden)
    measure(
        turns, call, op="linear_topk_kl", provider=provider, phase="value+grad", dtype=dtype,
        sizes={"N": rows, "H": width, "V": vocabulary, "k": 10}, work=4.0 * rows * width * vocabulary, unit="FLOP",
        errors=errors,
    )  # fmt: skip
