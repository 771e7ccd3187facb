"""The processes that search together: each holds a share of every batch, all of them see the same scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import distributed

from e3pruner.storage import fingerprint

T = TypeVar("T")


class Ranks:
    """The ranks of `torch.distributed`, where the caller has initialised it (torchrun, Accelerate); else just this one.

    Every method is a collective: all ranks call it, in the same order. Sums are taken in the order of the ranks on each
    of them, so that what they give has the same bits everywhere.
    """

    def __init__(self, device: torch.device) -> None:
        joined = distributed.is_available() and distributed.is_initialized()
        self.count = distributed.get_world_size() if joined else 1
        self.number = distributed.get_rank() if joined else 0
        self.first = self.number == 0
        self._device = device

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """`values` of every rank, by rank, in fp64; all ranks give as many."""
        if self.count == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64, device=self._device)
        all_values = [torch.empty_like(own) for _ in range(self.count)]
        distributed.all_gather(all_values, own)
        return [each.tolist() for each in all_values]

    def gather_any(self, content: T) -> list[T]:
        """`content` of every rank, by rank: anything that can be pickled."""
        if self.count == 1:
            return [content]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, content)
        return found

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each of `values` over the ranks."""
        return [sum(column) for column in zip(*self.gather(values), strict=True)]

    def check_equal(self, what: str, content: Any) -> None:
        """Raises `RuntimeError` naming `what`, on all ranks, unless the JSON value `content` is the same on all."""
        if self.count == 1:
            return
        digest = fingerprint(content)
        parts = [float(int(digest[start : start + 12], 16)) for start in (0, 12)]  # 48 bits are exact in fp64
        found = self.gather(parts)
        if others := [rank for rank, each in enumerate(found) if each != found[0]]:
            raise RuntimeError(f"{what} of rank {', '.join(map(str, others))} differ from those of rank 0")

    def together(self, what: str, own: Callable[[], T]) -> T:
        """What `own` gives for this rank's share. If it raises `ValueError` on a rank, none goes on to wait for that
        rank: the others raise `RuntimeError` naming `what` and the ranks."""
        result, error = None, None
        try:
            result = own()
        except ValueError as found:
            error = found
        refused = [rank for rank, each in enumerate(self.gather([float(error is not None)])) if each[0]]
        if error is not None:
            raise error
        if refused:
            raise RuntimeError(f"{what} of rank {', '.join(map(str, refused))} cannot be used; its error says why")
        return cast(T, result)

    def from_first(self, content: Any) -> Any:
        """`content` of rank 0, on every rank."""
        if self.count == 1:
            return content
        box = [content]
        distributed.broadcast_object_list(box, src=0, device=self._device)
        return box[0]
