"""The order in which training sequences are read: a function of (seed, position), so that a resume needs no state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from e3pruner.models.tokens import check_token_batches


class Batch(NamedTuple):
    """`input_ids` (B, S) int64, `rows` (B,): which sequences of the data they are."""

    input_ids: Tensor
    rows: Tensor

    @property
    def labels(self) -> Tensor:
        """(B, S − 1): the token that follows each position but the last."""
        return self.input_ids[:, 1:]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.rows)


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(size))


def shuffled_batch(data: Tensor, start: int, size: int, seed: int) -> Batch:
    """Sequences start … start + size − 1 of the endless stream of epochs over `data` (N, S), each epoch shuffled."""
    count = len(data)
    rows = [_permutation(count, seed, i // count)[i % count] for i in range(start, start + size)]
    index = torch.stack(rows)
    return Batch(data[index], index)


def in_order(data: Tensor, size: int) -> Iterator[Batch]:
    """`data` (N, S) once, in batches of `size` sequences; the last may be smaller."""
    for rows in torch.arange(len(data)).split(size):
        yield Batch(data[rows], rows)


def sequences_of(name: str, batches: Tensor | Iterable[Any], vocabulary: int) -> Tensor:
    """All sequences of `batches`, (N, S) or many (B, S), as one (N, S) int64 tensor on the CPU.

    Raises ValueError naming `name` for what is no such token ids below `vocabulary`.
    """
    return torch.cat(check_token_batches(name, [batches] if isinstance(batches, Tensor) else batches, vocabulary))
