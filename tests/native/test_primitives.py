"""The C++ building blocks, compiled alone for every instruction set that this machine runs."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e3kernels import backends
from e3kernels.building import INSTRUCTION_SETS
from e3kernels.reference.fixed_log import fixed_log
from e3kernels.reference.philox import uniform

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++")
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
DTYPES = {torch.bfloat16: 1, torch.float16: 2}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def runnable():
    widest = torch.ops.e3.native_isa() if "native" not in backends.unavailable else "baseline"
    return ISAS[: ISAS.index(widest) + 1]


@pytest.fixture(scope="module", params=runnable())
def library(request, tmp_path_factory):
    flags = next((sets[request.param] for sets in INSTRUCTION_SETS.values() if request.param in sets), [])
    target = tmp_path_factory.mktemp("primitives") / f"{request.param}.so"
    subprocess.run(
        [
            COMPILER, "-std=c++20", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-w", *flags, f"-I{ROOT / 'csrc'}",
            f"-DE3_ISA_NAMESPACE={request.param}", str(Path(__file__).with_name("primitives.cpp")), "-o", str(target),
        ],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(target))


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def apply(function, x):
    out = np.empty_like(x)
    function(pointer(x), ctypes.c_int64(len(x)), pointer(out))
    return out


def grid(low, high, count=1 << 20):
    return np.linspace(low, high, count, dtype=np.float32)


def test_exp_keeps_its_stated_error(library):
    x = grid(-87.3, 80)
    exact = np.exp(x.astype(np.float64))
    error = np.abs(apply(library.exp_of, x) - exact) / exact
    assert (error <= (3.6 + 1.25 * np.abs(x)) * 2.0**-24).all()


def test_exp_at_its_limits(library):
    x = np.array(
        [0, -0.0, -np.inf, np.inf, np.nan, -120, -3.4e38, 200, 3e38, -1e-30, 89, -1000] + [0] * 4, dtype=np.float32
    )
    expected = [1, 1, 0, np.inf, np.nan, 0, 0, np.inf, np.inf, 1, np.inf, 0]
    np.testing.assert_array_equal(apply(library.exp_of, x)[:12], np.array(expected, dtype=np.float32))


def test_log_keeps_its_stated_error(library):
    x = np.exp(grid(-86, 86).astype(np.float64)).astype(np.float32)
    exact = np.log(x.astype(np.float64))
    error = np.abs(apply(library.log_of, x) - exact)
    assert (error <= 1.5 * 2.0**-23 * np.maximum(np.abs(exact), 0.25)).all()


def test_tanh_keeps_small_arguments_exact(library):
    x = np.concatenate([grid(-12, 12), grid(-1e-3, 1e-3)])
    exact = np.tanh(x.astype(np.float64))
    assert (np.abs(apply(library.tanh_of, x) - exact) <= 4 * 2.0**-24 * np.abs(exact)).all()
    assert apply(library.tanh_of, np.full(16, np.nan, dtype=np.float32))[0] != 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_16_bit_number_widens_exactly(library, dtype):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    out = torch.empty(1 << 16)
    library.widen(
        *(ctypes.c_void_p(bits.data_ptr()), ctypes.c_int64(1 << 16)), DTYPES[dtype], ctypes.c_void_p(out.data_ptr())
    )
    torch.testing.assert_close(out, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**32), exponent=st.integers(-50, 40), count=st.integers(1, 200), shift=st.integers(0, 33))
def test_narrowing_rounds_as_torch_does(library, dtype, stream, seed, exponent, count, shift):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * 2.0**exponent
    values[0] = [torch.nan, torch.inf, -torch.inf, 0.0][seed % 4]
    out = torch.full((count + 40,), 7, dtype=dtype)
    target = ctypes.c_void_p(out.data_ptr() + 2 * shift)
    library.narrow_to(
        ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(count), DTYPES[dtype], ctypes.c_bool(stream), target
    )
    torch.testing.assert_close(out[shift : shift + count], values.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert out[:shift].eq(7).all()
    assert out[shift + count :].eq(7).all()


@given(
    seed=st.integers(0, 2**63 - 1), step=st.integers(0, 2**63 - 1), rows=st.integers(1, 3), columns=st.integers(1, 131)
)
def test_noise_has_the_bits_of_the_reference(library, seed, step, rows, columns):
    expected = -fixed_log(-fixed_log(uniform(rows, columns, seed, step, torch.device("cpu"))))
    for row in range(rows):
        out = torch.empty(columns, dtype=torch.float64)
        library.noise(
            ctypes.c_uint64(seed), ctypes.c_uint64(step), ctypes.c_uint32(row), ctypes.c_int64(columns),
            ctypes.c_void_p(out.data_ptr()),
        )  # fmt: skip
        assert torch.equal(out.view(torch.int64), expected[row].view(torch.int64))
