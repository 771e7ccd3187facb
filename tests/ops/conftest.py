"""Backends under test, textbook formulas, and the error bound that all operations are held to."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

import e3kernels as e3k
from e3kernels import backends, textbook

# It runs the kernels on CPU tensors, which only Triton's interpreter offers.
_service = backends.services.get(("triton", "entropy_kl"))
collect_ignore = [] if _service and "cpu" in _service.devices else ["test_triton_kernels.py"]

settings.register_profile(
    "e3kernels",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("e3kernels")


def _case(backend: str, *values: object, id: str) -> object:
    return pytest.param(backend, *values, id=id, marks=pytest.mark.slow if backend == "triton" else ())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a `backend` argument runs on each backend that serves the module's OPERATION on this machine's CPU;
    with `dtype` beside it, in each dtype that the backend serves. Under Triton's interpreter these tests are slow; the
    quick ones of that backend are in test_triton_kernels.py. A test with `any_backend` runs on each that there is."""
    if "any_backend" in metafunc.fixturenames:
        names = sorted({name for name, _ in backends.services})
        metafunc.parametrize("any_backend", [_case(name, id=name) for name in names], indirect=True)
    if "backend" not in metafunc.fixturenames or not hasattr(metafunc.module, "OPERATION"):
        return
    serving = {
        name: service.dtypes
        for (name, operation), service in backends.services.items()
        if operation == metafunc.module.OPERATION and (service.devices is None or "cpu" in service.devices)
    }
    if "dtype" in metafunc.fixturenames:
        pairs = [(name, dtype) for name, dtypes in serving.items() for dtype in dtypes]
        cases = [_case(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}") for name, dtype in pairs]
        metafunc.parametrize(("backend", "dtype"), cases, indirect=["backend"])
    else:
        metafunc.parametrize("backend", [_case(name, id=name) for name in serving], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with e3k.use_backend(request.param):
        yield request.param


any_backend = backend


@pytest.fixture(scope="session")
def naive_entropy_kl() -> Callable[..., Tensor]:
    """The dense loss of (N, V) logits in textbook PyTorch, in the dtype of its inputs."""
    return textbook.entropy_kl


@pytest.fixture(scope="session")
def naive_topk_kl() -> Callable[..., Tensor]:
    """The sparse loss of (N, V) logits in textbook PyTorch, in the dtype of its inputs."""
    return textbook.topk_kl


def _error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item() if exact.numel() else 0.0


@pytest.fixture(scope="session")
def assert_no_worse() -> Callable[..., None]:
    """assert_no_worse(ours, naive, exact, dtype, roundings=1): the error of each of our results, against exact fp64, is
    at most that of the naive same-dtype computation plus what the given number of roundings costs."""

    def check(
        ours: list[Tensor], naive: list[Tensor], exact: list[Tensor], dtype: torch.dtype, roundings: int = 1
    ) -> None:
        for mine, theirs, truth in zip(ours, naive, exact, strict=True):
            assert mine.shape == truth.shape
            scale = truth.abs().max().item() if truth.numel() else 0.0
            naive_error = _error(theirs, truth)
            tolerance = roundings * textbook.TOLERANCE[dtype] * (scale + 1e-3)
            assert _error(mine, truth) <= (math.inf if math.isnan(naive_error) else naive_error + tolerance)

    return check


def _with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], differentiable: int) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_(index < differentiable) for index, tensor in enumerate(inputs)]
    loss = function(*leaves)
    if loss.dim():
        loss.backward(torch.linspace(-1, 1, loss.numel(), dtype=loss.dtype).reshape(loss.shape))
    else:
        loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves[:differentiable])]


@pytest.fixture(scope="session")
def with_gradients() -> Callable[..., list[Tensor]]:
    """with_gradients(function, inputs, n): the value and the gradients of the first n inputs, for an incoming gradient
    of 1, or a ramp from −1 to 1 where the value is not a scalar."""
    return _with_gradients


@pytest.fixture(scope="session")
def rows_far_apart() -> Callable[[Tensor], Tensor]:
    """rows_far_apart(x): two rows (2, V) with 2³¹ elements between them; the pages that lie there are never touched."""

    def apart(rows: Tensor) -> Tensor:
        stride = 1 << 31
        return rows.new_empty(stride + rows.shape[1]).as_strided(rows.shape, (stride, 1)).copy_(rows)

    return apart


@pytest.fixture(scope="session")
def compiled_calls() -> Callable[..., tuple[list, int]]:
    """compiled_calls(function, argument lists): the results of the fullgraph-compiled function, and how often it was
    compiled."""

    def run(function: Callable[..., Tensor], calls: list[tuple]) -> tuple[list, int]:
        from torch._dynamo.testing import CompileCounterWithBackend

        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        return [compiled(*call) for call in calls], counter.frame_count

    return run
