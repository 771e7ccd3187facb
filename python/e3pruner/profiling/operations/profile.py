"""Every operation of `e3kernels` by shape, dtype and provider, beside what the machine can do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import e3kernels as e3k
from e3kernels import backends, textbook
from e3kernels.contract import BACKENDS
from e3kernels.profiling import named_range
from e3pruner.profiling.ceilings import Ceilings, measure_ceilings, seconds_of
from e3pruner.profiling.fit import check_fits
from e3pruner.profiling.operations.gradients import errors_of, gradient_of

EAGER = "eager"
PROVIDERS = (*BACKENDS, EAGER)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOP_K = 10
_LAYERS = 30
_CHECKED_ROWS = 16  # an error in fp64 costs time


class Case(NamedTuple):
    """One operation on given tensors: `losses` by kind of provider take `leaf`, whose gradient is wanted.

    `work` is what must move or be computed at least, value and gradient, in `unit`s, "B" or "FLOP".
    """

    leaf: Tensor
    ours: Callable[[Tensor], Any]
    eager: Callable[[Tensor], Tensor]
    work: float
    unit: str


@dataclass(frozen=True)
class OperationRow:
    """seconds: value and gradient. host: of the same call on the smallest tensors. rate: work a second. share: of the
    ceiling that bounds it. errors: of value and gradient against fp64, relative to the largest entry; None where the
    provider draws other random numbers.
    """

    operation: str
    provider: str
    dtype: str
    seconds: float
    host: float
    rate: float
    unit: str
    share: float
    errors: tuple[float, float] | None


@dataclass(frozen=True)
class OperationsProfile:
    """The rows and the ceilings that they are held against; the ceilings are measured first."""

    rows: list[OperationRow]
    ceilings: Ceilings


class Sizes(NamedTuple):
    """Tokens, vocabulary, width."""

    rows: int
    vocabulary: int
    hidden: int


def profile_operations(
    *,
    operations: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    rows: int = 256,
    vocabulary: int = 49_152,
    hidden: int = 576,
    device: str = "cpu",
    seed: int = 0,
    folder: Path | None = None,
) -> OperationsProfile:
    """Times value and gradient of each operation with each provider: the backends of `e3kernels`, and "eager", the
    formula as a textbook writes it. Without `providers`, all that serve on `device`. One traced call of each is kept
    as a Chrome trace in `folder`, if given.

    Raises ValueError for an operation, provider or dtype that is not known, or a shape that does not fit in memory;
    RuntimeError for a provider asked for that cannot serve.
    """
    check_choices({"operations": (operations, CASES), "providers": (providers, PROVIDERS), "dtypes": (dtypes, DTYPES)})
    sizes, on = Sizes(rows, vocabulary, hidden), torch.device(device)
    # Two logit tensors, their gradient, and what a textbook keeps on the way.
    need = 4 * (10 * rows * vocabulary + 2 * vocabulary * hidden)
    check_fits(need, on, f"rows={rows} with vocabulary={vocabulary}")
    chosen = [DTYPES[name] for name in dtypes]
    ceilings = measure_ceilings(on, tuple(chosen))
    measured, calls = [], []
    for operation in operations or list(CASES):
        for dtype in chosen:
            tensors = _prepared(operation, sizes, dtype, on, seed)
            for provider in providers or _serving(operation, on, dtype):
                row, call = _measure(operation, provider, dtype, tensors, on, ceilings)
                measured.append(row)
                calls.append((f"{operation} {row.dtype} {provider}", call))
    if folder is not None:
        with e3k.profile(folder):
            for name, call in calls:
                with named_range(name):
                    call()
    return OperationsProfile(measured, ceilings)


def check_choices(given: Mapping[str, tuple[Sequence[str] | None, Collection[str]]]) -> None:
    """Raises ValueError for a value that is none of those known, of what is `given` by name."""
    for name, (values, known) in given.items():
        if unknown := [value for value in values or () if value not in known]:
            raise ValueError(f"{name} has {unknown[0]!r}; choose of {', '.join(known)}")


def _serving(operation: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    services = {name: backends.services.get((name, operation)) for name in BACKENDS}
    serve = [name for name, service in services.items() if service and service.refusal(device.type, dtype) is None]
    return [*serve, EAGER]


class _Prepared(NamedTuple):
    """One operation's cases: as asked for, the smallest, of few tokens, and those in fp64."""

    case: Case
    smallest: Case
    few: Case
    exact: Case


def _prepared(operation: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> _Prepared:
    make, few = CASES[operation], sizes._replace(rows=min(sizes.rows, _CHECKED_ROWS))
    return _Prepared(
        make(sizes, dtype, device, seed),
        make(Sizes(1, 16, 8), dtype, device, seed),
        make(few, dtype, device, seed),
        make(few, dtype, device, seed, torch.float64),
    )


def _measure(
    operation: str,
    provider: str,
    dtype: torch.dtype,
    tensors: _Prepared,
    device: torch.device,
    ceilings: Ceilings,
) -> tuple[OperationRow, Callable[[], object]]:
    case = tensors.case
    call = _call(case, provider)
    with nullcontext() if provider == EAGER else e3k.use_backend(provider):
        seconds = seconds_of(call, device)
        host = seconds_of(_call(tensors.smallest, provider), device, budget=0.05)
        draws_otherwise = (operation, provider) == ("gumbel_topk", EAGER)
        errors = None if draws_otherwise else _errors(tensors, provider)
    name = str(dtype).removeprefix("torch.")
    rate = case.work / seconds
    ceiling = ceilings.gemm[name] if case.unit == "FLOP" else ceilings.copy
    row = OperationRow(operation, provider, name, seconds, host, rate, case.unit, rate / ceiling, errors)
    return row, _with_backend(call, provider)


def _with_backend(call: Callable[[], object], provider: str) -> Callable[[], object]:
    def chosen() -> object:
        with nullcontext() if provider == EAGER else e3k.use_backend(provider):
            return call()

    return chosen


def _call(case: Case, provider: str) -> Callable[[], object]:
    leaf = case.leaf.requires_grad_()
    function = case.eager if provider == EAGER else case.ours
    return gradient_of(lambda: function(leaf).sum(), leaf)


def _errors(tensors: _Prepared, provider: str) -> tuple[float, float]:
    """Against the reference in fp64, on the same numbers, which the dtype can hold."""

    def truth(leaf: Tensor) -> Tensor:
        with e3k.use_backend("reference"):
            value: Tensor = tensors.exact.ours(leaf)
            return value

    few = tensors.few
    return errors_of(few.eager if provider == EAGER else few.ours, truth, few.leaf)


def _random(
    seed: int,
    dtype: torch.dtype,
    exact: torch.dtype | None,
    device: torch.device,
    *shapes: tuple[int, ...],
    scale: float,
) -> list[Tensor]:
    """Normal numbers rounded to `dtype`, all but the first then held in `exact`, if given."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [(scale * torch.randn(shape, generator=generator)).to(dtype).to(device) for shape in shapes]
    return drawn if exact is None else [drawn[0], *(tensor.to(exact) for tensor in drawn[1:])]


def _gumbel_topk(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int, exact: torch.dtype | None = None
) -> Case:
    (theta,) = _random(seed, dtype, None, device, (_LAYERS,), scale=1.0)
    keep = _LAYERS * 3 // 4
    incoming = torch.linspace(0, 1, _LAYERS, dtype=exact or dtype, device=device)
    return Case(
        theta,
        lambda x: (e3k.gumbel_topk(x, keep, tau=0.7, seed=seed).mask * incoming).sum(),
        lambda x: (textbook.gumbel_topk(x, keep, 0.7, "threshold") * incoming).sum(),
        3 * theta.nbytes,
        "B",
    )


def _entropy_kl(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int, exact: torch.dtype | None = None
) -> Case:
    shape = (sizes.rows, sizes.vocabulary)
    student, teacher = _random(seed, dtype, exact, device, shape, shape, scale=3.0)
    return Case(
        student,
        lambda z: e3k.entropy_kl(z, teacher),
        lambda z: textbook.entropy_kl(z, teacher),
        3 * student.nbytes,
        "B",
    )


def _topk_kl(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int, exact: torch.dtype | None = None
) -> Case:
    shape = (sizes.rows, sizes.vocabulary)
    student, teacher = _random(seed, dtype, exact, device, shape, shape, scale=3.0)
    stored = _stored(teacher, exact)
    return Case(
        student, lambda z: e3k.topk_kl(z, *stored), lambda z: textbook.topk_kl(z, *stored), 2 * student.nbytes, "B"
    )


def _linear_entropy_kl(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int, exact: torch.dtype | None = None
) -> Case:
    hidden, teacher, weight, teacher_weight = _heads(sizes, dtype, device, seed, exact)
    return Case(
        hidden,
        lambda h: e3k.linear_entropy_kl(h, weight, teacher, teacher_weight),
        lambda h: textbook.entropy_kl(F.linear(h, weight), F.linear(teacher, teacher_weight)),
        6.0 * sizes.rows * sizes.vocabulary * sizes.hidden,
        "FLOP",
    )


def _linear_topk_kl(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int, exact: torch.dtype | None = None
) -> Case:
    hidden, teacher, weight, teacher_weight = _heads(sizes, dtype, device, seed, exact)
    stored = _stored(F.linear(teacher, teacher_weight), exact)
    return Case(
        hidden,
        lambda h: e3k.linear_topk_kl(h, weight, *stored),
        lambda h: textbook.topk_kl(F.linear(h, weight), *stored),
        4.0 * sizes.rows * sizes.vocabulary * sizes.hidden,
        "FLOP",
    )


def _gated_residual(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int, exact: torch.dtype | None = None
) -> Case:
    shape = (sizes.rows, sizes.hidden)
    # Positive numbers: a sum that cancels would make any rounding look like an error.
    branch, hidden, incoming = (x.abs() for x in _random(seed, dtype, exact, device, shape, shape, shape, scale=1.0))
    gate = torch.tensor(0.3, device=device)
    return Case(
        branch,
        lambda f: (e3k.gated_residual(hidden, f, gate) * incoming).sum(),
        lambda f: (textbook.gated_residual(hidden, f, gate) * incoming).sum(),
        6 * branch.nbytes,
        "B",
    )


def _heads(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int, exact: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (N, H) of student and teacher, and their heads (V, H), whose logits have a spread of some units."""
    of_tokens, of_head = (sizes.rows, sizes.hidden), (sizes.vocabulary, sizes.hidden)
    hidden, teacher = _random(seed, dtype, exact, device, of_tokens, of_tokens, scale=1.0)
    _, *heads = _random(seed + 1, dtype, exact, device, (1,), of_head, of_head, scale=2 / sizes.hidden**0.5)
    return hidden, teacher, heads[0], heads[1]


def _stored(logits: Tensor, exact: torch.dtype | None) -> tuple[Tensor, Tensor]:
    values, ids = logits.to(exact or torch.float32).log_softmax(-1).topk(min(_TOP_K, logits.shape[-1]))
    return values, ids


CASES: dict[str, Callable[..., Case]] = {
    "gumbel_topk": _gumbel_topk,
    "entropy_kl": _entropy_kl,
    "topk_kl": _topk_kl,
    "linear_entropy_kl": _linear_entropy_kl,
    "linear_topk_kl": _linear_topk_kl,
    "gated_residual": _gated_residual,
}
