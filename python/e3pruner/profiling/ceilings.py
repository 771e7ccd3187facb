"""What this machine can do at most, measured beside everything that is held against it: the fastest of several kernels
and shapes for each limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from e3kernels.backends import native_isa
from e3kernels.native import native_products
from e3pruner.timing import Estimate, Timed

_BYTES = 256 << 20  # beyond most caches
_SQUARES = (1024, 2048)
_WIDE = (256, 576, 8192)  # tokens, width and vocabulary of an output head's tile

Key = tuple[str, str]  # of a probe: the limit it is for, and its kernel
Synchronize = Callable[[], None]


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second that all threads read, and copy (read and written bytes both counted), of memory beyond the
    caches; FLOPs a second of matrix products, by dtype; seconds of a call of the dispatcher that does nothing.
    `estimates`: the seconds of each limit's fastest kernel, over the rounds.
    """

    read: float
    copy: float
    gemm: dict[str, float]
    dispatch: float
    estimates: dict[str, Estimate] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        return [{"kind": "ceilings"} | asdict(self)]


class Probe(NamedTuple):
    """One kernel at a limit: `work` is the bytes or FLOPs of a call, 1 for the dispatcher."""

    work: float
    seconds: Callable[[], float]


def probes(device: torch.device, dtypes: Sequence[torch.dtype]) -> dict[Key, Probe]:
    """The kernels that are tried for each limit of `device`: to be called in turns with what is held against it."""
    synchronize = synchronizer(device)
    source = torch.ones(_BYTES // 4, device=device)
    matrix = source.view(1 << 13, -1)
    vector = torch.ones(matrix.shape[1], device=device)
    # Which of the two reads faster depends on the machine's number of cores.
    reads: dict[str, Callable[[], object]] = {"sum": source.sum, "matrix × vector": lambda: matrix @ vector}
    found = {("read", name): Probe(_BYTES, Timed(call, synchronize)) for name, call in reads.items()}
    found |= copies(source, synchronize)
    for dtype in dtypes:
        found |= products(device, dtype)
    empty, alias = torch.ones(1, device=device), torch.ops.aten.alias.default
    found["dispatch", "alias"] = Probe(1, Timed(lambda: alias(empty), synchronize))
    return found


def copies(source: Tensor, synchronize: Synchronize | None) -> dict[Key, Probe]:
    """What moves the bytes of `source`: read and written, both counted. A small one stays in a cache."""
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "negative": lambda: torch.neg(source, out=target),
    }
    return {("copy", name): Probe(2 * source.nbytes, Timed(call, synchronize)) for name, call in calls.items()}


def products(device: torch.device, dtype: torch.dtype) -> dict[Key, Probe]:
    """Matrix products in `dtype`: square ones, and tokens with a head, by torch and where they serve by our kernels."""
    synchronize, limit = synchronizer(device), f"matrix product {str(dtype).removeprefix('torch.')}"
    found: dict[Key, Probe] = {}
    for size in _SQUARES:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        found[limit, f"{size}²"] = Probe(2 * size**3, Timed(partial(torch.mm, a, b, out=out), synchronize))
    tokens, width, vocabulary = _WIDE
    hidden, head = (torch.randn(rows, width, device=device).to(dtype) for rows in (tokens, vocabulary))
    work, logits = 2 * tokens * width * vocabulary, torch.empty(tokens, vocabulary, device=device, dtype=dtype)
    found[limit, "head"] = Probe(work, Timed(lambda: torch.mm(hidden, head.T, out=logits), synchronize))
    if device.type == "cpu" and (name := native_isa()) is not None:
        ours = native_products(name)
        found[limit, "head, ours"] = Probe(work, Timed(lambda: ours.logits(hidden, head, None, logits), synchronize))
    return found


def fastest(tried: Mapping[Key, Probe], seconds: Mapping[Key, Sequence[float]], limit: str) -> tuple[float, Estimate]:
    """Work a second of the fastest kernel tried for `limit`, and the estimate of its seconds."""
    rates = {
        key: (probe.work / (estimate := Estimate.of_times(seconds[key])).value, estimate)
        for key, probe in tried.items()
        if key[0] == limit
    }
    return max(rates.values(), key=lambda rate: rate[0])


def ceilings_of(tried: Mapping[Key, Probe], seconds: Mapping[Key, Sequence[float]]) -> Ceilings:
    """The limits from the rounds' `seconds` of every probe."""
    limits = {limit: fastest(tried, seconds, limit) for limit in dict.fromkeys(limit for limit, _ in tried)}
    gemm = {limit.rpartition(" ")[2]: rate for limit, (rate, _) in limits.items() if limit.startswith("matrix")}
    return Ceilings(
        read=limits["read"][0],
        copy=limits["copy"][0],
        gemm=gemm,
        dispatch=1 / limits["dispatch"][0],
        estimates={limit: estimate for limit, (_, estimate) in limits.items()},
    )


def synchronizer(device: torch.device) -> Synchronize | None:
    """What waits for the work that `device` was given; None where a call returns when it is done."""
    return None if device.type == "cpu" else lambda: torch.accelerator.synchronize(device)
