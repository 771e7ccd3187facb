"""The products of the linear losses' tiles: fp32 on AVX-512, bf16 on AVX-512 BF16 or AMX."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e3kernels.backends import native_isa
from e3kernels.native import PRODUCTS, native_products

DTYPES, FEW_ROWS = PRODUCTS.get(native_isa(), ((), 0))
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}

pytestmark = pytest.mark.skipif(not DTYPES, reason=f"needs AVX-512; the kernels here run on {native_isa()}")
served = pytest.mark.parametrize("dtype", DTYPES)
sizes = [1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 95, 100, 129, 300, 700]


def normal(*shape, dtype, seed, gap=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape[:-1], shape[-1] + gap, generator=generator).to(dtype)[..., : shape[-1]]


class Guarded:
    """A contiguous matrix with undefined values around it, a line of a cache or more, to be left alone."""

    def __init__(self, rows, columns, dtype):
        self.memory = torch.full((rows * columns + 64,), torch.nan, dtype=dtype)
        self.matrix = self.memory[32:-32].view(rows, columns)

    def untouched(self):
        return torch.cat((self.memory[:32], self.memory[-32:])).isnan().all()


def assert_rounded_once(out, exact, size):
    """The sum in fp32, however ordered, then one rounding; `size` is the sum of the terms' magnitudes."""
    assert ((out.double() - exact).abs() <= UNIT[out.dtype] * exact.abs() + 2.0**-20 * size).all()


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    dtype=st.sampled_from(DTYPES or [None]),
    rows=st.integers(1, 110),
    width=st.sampled_from(sizes),
    vocabulary=st.sampled_from(sizes),
    gap=st.sampled_from([0, 3]),
    biased=st.booleans(),
)
def test_logits(dtype, rows, width, vocabulary, gap, biased):
    hidden = normal(rows, width, dtype=dtype, seed=1, gap=gap)
    weight = normal(vocabulary, width, dtype=dtype, seed=2, gap=gap)
    bias = normal(vocabulary, dtype=dtype, seed=3) if biased else None
    out = Guarded(rows, vocabulary, dtype)
    torch.ops.e3.linear_logits(hidden, weight, bias, out.matrix)
    exact = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    size = hidden.double().abs() @ weight.double().abs().t() + (0 if bias is None else bias.double().abs())
    assert_rounded_once(out.matrix, exact, size)
    assert out.untouched()


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    dtype=st.sampled_from(DTYPES or [None]),
    rows=st.integers(1, 110),
    width=st.sampled_from(sizes),
    vocabulary=st.sampled_from([*sizes, 1200]),
    gap=st.sampled_from([0, 3]),
)
def test_gradient_of_the_hidden_states(dtype, rows, width, vocabulary, gap):
    grad = normal(rows, vocabulary, dtype=dtype, seed=1, gap=gap)
    weight = normal(vocabulary, width, dtype=dtype, seed=2, gap=gap)
    out = Guarded(rows, width, dtype)
    torch.ops.e3.linear_grad_hidden(grad, weight, out.matrix)
    assert_rounded_once(out.matrix, grad.double() @ weight.double(), grad.double().abs() @ weight.double().abs())
    assert out.untouched()


@served
def test_infinite_and_undefined_values_stay_where_they_are(dtype):
    hidden, weight = normal(33, 64, dtype=dtype, seed=1), normal(70, 64, dtype=dtype, seed=2)
    bias = torch.zeros(70, dtype=dtype)
    hidden[7, 3], bias[5] = torch.nan, -torch.inf
    logits, grad_hidden = torch.empty(33, 70, dtype=dtype), torch.empty(33, 64, dtype=dtype)
    torch.ops.e3.linear_logits(hidden, weight, bias, logits)
    assert torch.equal(logits.isnan().all(1), torch.arange(33) == 7)
    assert torch.equal(logits.isnan().any(1), torch.arange(33) == 7)
    assert torch.equal((logits == -torch.inf).any(0), torch.arange(70) == 5)
    torch.ops.e3.linear_grad_hidden(logits.clamp(min=-100), weight, grad_hidden)
    assert torch.equal(grad_hidden.isnan().all(1), torch.arange(33) == 7)
    assert torch.equal(grad_hidden.isnan().any(1), torch.arange(33) == 7)


@served
def test_threads_change_no_bit(dtype):
    hidden, weight = normal(40, 160, dtype=dtype, seed=1), normal(1000, 160, dtype=dtype, seed=2)
    results, before = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        logits, grad_hidden = torch.empty(40, 1000, dtype=dtype), torch.empty(40, 160, dtype=dtype)
        torch.ops.e3.linear_logits(hidden, weight, None, logits)
        torch.ops.e3.linear_grad_hidden(logits, weight, grad_hidden)
        results.append((logits, grad_hidden))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


@pytest.mark.parametrize(
    ("rows", "columns", "own"), [(FEW_ROWS, False, True), (FEW_ROWS, True, False), (FEW_ROWS + 1, False, False)]
)
def test_many_rows_and_a_head_of_columns_go_to_torch(monkeypatch, rows, columns, own):
    served = []
    for name in ("linear_logits", "linear_grad_hidden"):
        monkeypatch.setattr(torch.ops.e3, name, lambda *tensors, name=name: served.append(name) or tensors[-1].zero_())
    products = native_products(native_isa())
    hidden, weight = of(torch.float32, rows, 8), of(torch.float32, 6, 8)
    weight = weight.t().contiguous().t() if columns else weight
    logits = products.logits(hidden, weight, None, of(torch.float32, rows, 6))
    grad_hidden = products.grad_hidden(logits, weight, of(torch.float32, rows, 8))
    assert served == (["linear_logits", "linear_grad_hidden"] if own else [])
    assert logits.eq(0 if own else 8).all()
    assert grad_hidden.eq(0 if own else 48).all()


def of(dtype, *shape):
    return torch.ones(shape, dtype=dtype)


@served
@pytest.mark.parametrize(
    ("operation", "shapes", "changed", "value", "named"),
    [
        ("linear_logits", ((4, 8), (6, 8), (6,), (4, 6)), 0, of(torch.float16, 4, 8), "hidden"),
        ("linear_logits", ((4, 8), (6, 8), (6,), (4, 6)), 1, of(torch.float16, 6, 8), "weight"),
        ("linear_logits", ((4, 8), (6, 8), (6,), (4, 6)), 1, of(torch.float32, 6, 7), "weight"),
        ("linear_logits", ((4, 8), (6, 8), (6,), (4, 6)), 2, of(torch.float16, 6), "bias"),
        ("linear_logits", ((4, 8), (6, 8), (6,), (4, 6)), 3, of(torch.float16, 4, 6), "out has a dtype"),
        ("linear_grad_hidden", ((4, 6), (6, 8), (4, 8)), 0, of(torch.float16, 4, 6), "grad"),
        ("linear_grad_hidden", ((4, 6), (6, 8), (4, 8)), 1, of(torch.float32, 5, 8), "weight"),
        ("linear_grad_hidden", ((4, 6), (6, 8), (4, 8)), 2, of(torch.float16, 4, 8), "out has a dtype"),
    ],
)
def test_a_wrong_argument_is_named(dtype, operation, shapes, changed, value, named):
    arguments = [of(dtype, *shape) for shape in shapes]
    arguments[changed] = value
    with pytest.raises(RuntimeError, match=named):
        getattr(torch.ops.e3, operation)(*arguments)


@served
@pytest.mark.parametrize("shape", [(4, 5), (5, 6), (6, 4)])
def test_out_has_its_shape_and_no_gaps(dtype, shape):
    out = of(dtype, *shape).t() if shape == (6, 4) else of(dtype, *shape)
    with pytest.raises(RuntimeError, match="out must be contiguous"):
        torch.ops.e3.linear_logits(of(dtype, 4, 8), of(dtype, 6, 8), None, out)
