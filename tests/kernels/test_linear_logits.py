"""The AMX product behind the linear losses' bf16 logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e3kernels.backends import native_isa

pytestmark = pytest.mark.skipif(native_isa() != "amx", reason=f"needs AMX; the kernels here run on {native_isa()}")


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rows=st.integers(1, 70),
    width=st.sampled_from([1, 2, 31, 32, 33, 64, 100]),
    vocabulary=st.sampled_from([1, 15, 16, 17, 31, 32, 33, 48, 95, 333]),
    gap=st.sampled_from([0, 3]),
    biased=st.booleans(),
)
def test_sums_are_fp32_and_rounded_once(rows, width, vocabulary, gap, biased):
    hidden, weight = normal(rows, width + gap, seed=1)[:, :width], normal(vocabulary, width + gap, seed=2)[:, :width]
    bias = normal(vocabulary, seed=3) if biased else None
    memory = torch.full((rows * vocabulary + 64,), torch.nan, dtype=torch.bfloat16)
    out = memory[32:-32].view(rows, vocabulary)
    torch.ops.e3.linear_logits(hidden, weight, bias, out)
    exact = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    size = hidden.double().abs() @ weight.double().abs().t() + 1
    assert ((out.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2.0**-20 * size).all()
    around = torch.cat((memory[:32], memory[-32:]))
    assert around.isnan().all()


def test_infinite_and_undefined_values_stay_where_they_are():
    hidden, weight, bias = normal(33, 64, seed=1), normal(70, 64, seed=2), torch.zeros(70).bfloat16()
    hidden[7, 3], bias[5] = torch.nan, -torch.inf
    out = torch.empty(33, 70, dtype=torch.bfloat16)
    torch.ops.e3.linear_logits(hidden, weight, bias, out)
    assert torch.equal(out.isnan().all(1), torch.arange(33) == 7)
    assert torch.equal(out.isnan().any(1), torch.arange(33) == 7)
    assert torch.equal((out == -torch.inf).any(0), torch.arange(70) == 5)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(threads):
    hidden, weight = normal(40, 96, seed=1), normal(1000, 96, seed=2)
    results, before = [], torch.get_num_threads()
    for count in (1, threads):
        torch.set_num_threads(count)
        results.append(torch.empty(40, 1000, dtype=torch.bfloat16))
        torch.ops.e3.linear_logits(hidden, weight, None, results[-1])
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_a_wrong_argument_is_named():
    hidden, weight, out = normal(4, 8, seed=1), normal(6, 8, seed=2), torch.empty(4, 6, dtype=torch.bfloat16)
    for arguments, name in (
        ((hidden.float(), weight, None, out), "hidden"),
        ((hidden, weight, None, torch.empty(4, 5, dtype=torch.bfloat16)), "out must be contiguous"),
        ((hidden, weight[:, :7], None, out), "weight"),
        ((hidden, weight, torch.zeros(6), out), "bias"),
    ):
        with pytest.raises(RuntimeError, match=name):
            torch.ops.e3.linear_logits(*arguments)
