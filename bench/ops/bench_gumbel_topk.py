"""gumbel_topk against eager relaxations; floor: an operator of a compiled library that returns its argument.

`autograd alone` is what no gradient from Python can do without: one C++ operator and torch.autograd.grad of it.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from measure import measure
from torch.utils.cpp_extension import load

import e3kernels as e3k
from e3kernels.textbook import gumbel_topk as textbook

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"


@cache
def empty_operator():
    source = Path(__file__).with_name("empty_operator.cpp")
    load("e3_bench_empty", [str(source)], extra_cflags=[STABLE_ABI, "-std=c++20"], is_python_module=False)
    return torch.ops.e3_bench.empty


@pytest.mark.parametrize("length", [30, 128])
@pytest.mark.parametrize("phase", ["value", "value+grad"])
@pytest.mark.parametrize("provider", ["floor", "autograd alone", "e3", "eager softmax", "eager threshold"])
def test_gumbel_topk(turns, provider, phase, length):
    theta = torch.linspace(-2, 2, length).requires_grad_()
    k, incoming = length * 3 // 4, torch.linspace(-1, 1, length)
    if provider == "floor":
        operator, plain = empty_operator(), theta.detach()
        call = lambda: operator(plain)  # noqa: E731
    else:
        sample = {
            "autograd alone": lambda: theta.clone(),
            "e3": lambda: e3k.gumbel_topk(theta, k, tau=0.7, seed=1, step=2).mask,
            "eager softmax": lambda: textbook(theta, k, 0.7, "softmax"),
            "eager threshold": lambda: textbook(theta, k, 0.7, "threshold"),
        }[provider]
        call = sample
        if phase == "value+grad":
            call = lambda: torch.autograd.grad(sample(), theta, incoming)  # noqa: E731
    with torch.set_grad_enabled(phase != "value"):
        measure(
            turns, call, op="gumbel_topk", provider=provider, phase=phase, dtype=torch.float32,
            sizes={"L": length, "k": k}, work=length * 4, unit="B",
        )  # fmt: skip
