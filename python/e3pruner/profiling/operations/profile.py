"""Every operation of `e3kernels` by shape, dtype and provider, beside what the machine can do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

import e3kernels as e3k
from e3kernels import backends, textbook
from e3kernels.contract import BACKENDS
from e3kernels.profiling import named_range
from e3pruner.profiling.ceilings import (
    Ceilings,
    Key,
    Probe,
    ceilings_of,
    copies,
    fastest,
    probes,
    synchronizer,
)
from e3pruner.profiling.doubts import above_ceiling
from e3pruner.profiling.fit import check_fits
from e3pruner.profiling.operations.gradients import errors_of, gradient_of
from e3pruner.timing import Estimate, Timed, all_settled, in_turns, unsettled

EAGER = "eager"
PROVIDERS = (*BACKENDS, EAGER)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOP_K = 10
_LAYERS = 30
_CHECKED_ROWS = 16  # an error in fp64 costs time
Name = TypeVar("Name")


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
    """seconds: value and gradient; quartiles: of the `rounds`. host: of the same call on the smallest tensors, where
    that is known. rate: work a second. limit: what the machine does at most with as much work, measured in the same
    rounds; share: of it. errors: of value and gradient against fp64, relative to the largest entry; None where the
    provider draws other random numbers.
    """

    operation: str
    provider: str
    dtype: str
    seconds: float
    quartiles: tuple[float, float]
    rounds: int
    host: float | None
    rate: float
    unit: str
    limit: float
    share: float
    errors: tuple[float, float] | None

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.seconds, *self.quartiles, self.rounds)


@dataclass(frozen=True)
class OperationsProfile:
    """The rows and the machine's limits for tensors beyond the caches; doubts: what of it is not reliable, and why."""

    rows: list[OperationRow]
    ceilings: Ceilings
    doubts: list[str] = field(default_factory=list)


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
    rounds: int = 5,
    limit: float = 0.0,
    folder: Path | None = None,
) -> OperationsProfile:
    """Times value and gradient of each operation with each provider: the backends of `e3kernels`, and "eager", the
    formula as a textbook writes it. Without `providers`, all that serve on `device`. One traced call of each is kept
    as a Chrome trace in `folder`, if given.

    The providers of an operation take turns with the kernels that its ceiling is measured by, for `rounds` rounds, and
    as many more as it takes until each is known to 2 % or `limit` seconds have passed, of which every operation gets
    its share.

    Raises ValueError for an operation, provider or dtype that is not known, or a shape that does not fit in memory;
    RuntimeError for a provider asked for that cannot serve.
    """
    check_choices({"operations": (operations, CASES), "providers": (providers, PROVIDERS), "dtypes": (dtypes, DTYPES)})
    sizes, on = Sizes(rows, vocabulary, hidden), torch.device(device)
    # Two logit tensors, their gradient, and what a textbook keeps on the way.
    need = 4 * (10 * rows * vocabulary + 2 * vocabulary * hidden)
    check_fits(need, on, f"rows={rows} with vocabulary={vocabulary}")
    chosen = [DTYPES[name] for name in dtypes]
    turns = Turns(rounds, limit / (1 + len(chosen) * len(operations or CASES)))
    tried = probes(on, chosen)
    ceilings = ceilings_of(tried, turns.take({key: probe.seconds for key, probe in tried.items()}))
    measured, calls, doubts = [], [], []
    for operation in operations or list(CASES):
        for dtype in chosen:
            tensors = _prepared(operation, sizes, dtype, on, seed)
            serving = providers or _serving(operation, on, dtype)
            found, said = _measure(operation, serving, dtype, tensors, on, tried, turns)
            measured += found
            doubts += said
            calls += [
                (
                    f"{operation} {row.dtype} {row.provider}",
                    _with_backend(_call(tensors.case, row.provider), row.provider),
                )
                for row in found
            ]
    if folder is not None:
        with e3k.profile(folder, force=True):
            for name, call in calls:
                with named_range(name):
                    call()
    return OperationsProfile(measured, ceilings, doubts)


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


class Turns(NamedTuple):
    """How long one group of actions is measured."""

    rounds: int
    limit: float

    def take(self, actions: Mapping[Name, Callable[[], float]]) -> dict[Name, list[float]]:
        """The seconds of every action in every round, until all are known."""
        return in_turns(actions, self.rounds, limit=self.limit, settled=all_settled)


def _measure(
    operation: str,
    providers: Sequence[str],
    dtype: torch.dtype,
    tensors: _Prepared,
    device: torch.device,
    tried: Mapping[Key, Probe],
    turns: Turns,
) -> tuple[list[OperationRow], list[str]]:
    """A row for each provider, and what of them is to be doubted."""
    case, name, synchronize = tensors.case, str(dtype).removeprefix("torch."), synchronizer(device)
    if case.unit == "FLOP":
        bound = f"matrix product {name}"
        limits = {key: probe for key, probe in tried.items() if key[0] == bound}
    else:  # a copy of as many bytes, which may fit into a cache as the operation's do
        bound, limits = "copy", copies(torch.empty(max(1, int(case.work) // 8), device=device), synchronize)
    actions: dict[Any, Callable[[], float]] = {key: probe.seconds for key, probe in limits.items()}
    for provider in providers:
        with chosen_backend(provider):
            for what, of in (("call", case), ("host", tensors.smallest)):
                actions[provider, what] = Timed(_with_backend(_call(of, provider), provider), synchronize)
    seconds = turns.take(actions)
    limit, of_limit = fastest(limits, {key: seconds[key] for key in limits}, bound)
    rows, doubts = [], []
    for provider in providers:
        call, host = (Estimate.of_times(seconds[provider, what]) for what in ("call", "host"))
        with chosen_backend(provider):
            draws_otherwise = (operation, provider) == ("gumbel_topk", EAGER)
            errors = None if draws_otherwise else _errors(tensors, provider)
        rate, label = case.work / call.value, f"{operation}, {name}, {provider}"
        known = host.value if host.known else None
        row = OperationRow(
            operation,
            provider,
            name,
            call.value,
            (call.low, call.high),
            call.rounds,
            known,
            rate,
            case.unit,
            limit,
            rate / limit,
            errors,
        )
        rows.append(row)
        doubts += unsettled({label: call})
        doubts += above_ceiling(label, call, of_limit, row.share)
    return rows, doubts


def chosen_backend(provider: str) -> AbstractContextManager[object]:
    return nullcontext() if provider == EAGER else e3k.use_backend(provider)


def _with_backend(call: Callable[[], object], provider: str) -> Callable[[], object]:
    def chosen() -> object:
        with chosen_backend(provider):
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
