"""Backends under test, textbook formulas, and the error bound that all operations are held to."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from torch import Tensor

import e3kernels as e3k
from e3kernels import backends

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

# What one rounding to the dtype, and sums in fp32 (fp64), may cost relative to the largest value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _case(backend: str, *values: object, id: str) -> object:
    return pytest.param(backend, *values, id=id, marks=pytest.mark.slow if backend == "triton" else ())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a `backend` argument runs on each backend that serves the module's OPERATION on this machine's CPU;
    with `dtype` beside it, in each dtype that the backend serves. Under Triton's interpreter these tests are slow; the
    quick ones of that backend are in test_triton_kernels.py."""
    if "backend" not in metafunc.fixturenames:
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


def _per_token(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, log_target=True, reduction="none").sum(-1)

    if divergence == "forward":
        return kl(log_p, log_q)
    if divergence == "reverse":
        return kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def _cap(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _combine(
    divergence: Tensor,
    entropy: Tensor,
    support: int,
    logits: Tensor,
    labels: Tensor | None,
    token_mask: Tensor | None,
    *,
    temperature: float = 1.0,
    weighting: str = "entropy",
    gamma: float = 1.0,
    kd_ratio: float = 1.0,
    ignore_index: int = -100,
    num_items: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    ratio = entropy.detach() / math.log(support) if support > 1 else 0 * entropy.detach()
    valid = torch.ones_like(divergence, dtype=torch.bool)
    hard = torch.zeros_like(divergence)
    if labels is not None:
        valid = labels != ignore_index
        hard = F.cross_entropy(logits, labels, reduction="none", ignore_index=ignore_index)
    if token_mask is not None:
        valid = valid & token_mask
    weight = {
        "none": torch.ones_like(ratio),
        "entropy": 1 + gamma * ratio,
        "inverse": 1 + gamma * (1 - ratio),
        "mix": torch.ones_like(ratio),
    }[weighting]
    if weighting == "mix":
        token = ratio * temperature**2 * divergence + (1 - ratio) * hard
    else:
        token = weight * (kd_ratio * temperature**2 * divergence + (1 - kd_ratio) * hard)
    token = token * valid
    if reduction == "none":
        return token
    total = token.sum()
    if reduction == "sum":
        return total
    return total / ((weight * valid).sum() if num_items is None else num_items)


def _naive_entropy_kl(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    token_mask: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    **rest: object,
) -> Tensor:
    z, zt = _cap(student, student_softcap, student_scale), _cap(teacher, teacher_softcap, teacher_scale)
    log_p, log_q = F.log_softmax(zt / temperature, -1), F.log_softmax(z / temperature, -1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    value = _per_token(log_p, log_q, divergence, beta)
    return _combine(value, entropy, z.shape[-1], z, labels, token_mask, temperature=temperature, **rest)


def _naive_topk_kl(
    student: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    labels: Tensor | None = None,
    *,
    token_mask: Tensor | None = None,
    tail: str = "bucket",
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    student_softcap: float | None = None,
    student_scale: float = 1.0,
    **rest: object,
) -> Tensor:
    z = _cap(student, student_softcap, student_scale)
    log_p = teacher_logprobs.to(z.dtype)
    log_q = F.log_softmax(z / temperature, -1).gather(-1, teacher_ids)
    stored = F.log_softmax(log_p, -1)
    if tail == "renorm":
        log_p, log_q = stored, F.log_softmax(log_q, -1)
    elif tail == "bucket":
        log_p = torch.cat((log_p, (1 - log_p.exp().sum(-1, keepdim=True)).log()), -1)
        log_q = torch.cat((log_q, (1 - log_q.exp().sum(-1, keepdim=True)).log()), -1)
    entropy = torch.special.entr(stored.exp()).sum(-1)
    value = _per_token(log_p, log_q, divergence, beta)
    return _combine(value, entropy, stored.shape[-1], z, labels, token_mask, temperature=temperature, **rest)


@pytest.fixture(scope="session")
def naive_entropy_kl() -> Callable[..., Tensor]:
    """The dense loss of (N, V) logits in textbook PyTorch, in the dtype of its inputs."""
    return _naive_entropy_kl


@pytest.fixture(scope="session")
def naive_topk_kl() -> Callable[..., Tensor]:
    """The sparse loss of (N, V) logits in textbook PyTorch, in the dtype of its inputs."""
    return _naive_topk_kl


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
            tolerance = roundings * TOLERANCE[dtype] * (scale + 1e-3)
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
