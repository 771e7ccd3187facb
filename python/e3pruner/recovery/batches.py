"""The order in which training sequences are read: a function of (seed, position), so that a resume needs no state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from e3pruner.models.tokens import check_token_batches

IGNORED = -100


class Batch(NamedTuple):
    """`input_ids` (B, S) int64; `labels` (B, S − 1): the token to predict at each position but the last, or `IGNORED`.

    `rows` (B,): which sequences of the training data they are, for a teacher that stores its predictions.
    `attention_mask` (B, S): 0 on padding; None: there is none.
    """

    input_ids: Tensor
    labels: Tensor
    rows: Tensor | None = None
    attention_mask: Tensor | None = None

    @staticmethod
    def of_rows(data: Tensor, rows: Tensor) -> Batch:
        """Sequences `rows` of `data` (N, S), every token of them to be predicted."""
        input_ids = data[rows]
        return Batch(input_ids, input_ids[:, 1:], rows)

    def to(self, device: torch.device) -> Batch:
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return Batch(self.input_ids.to(device), self.labels.to(device), self.rows, mask)


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(size))


def shuffled_batch(data: Tensor, start: int, size: int, seed: int) -> Batch:
    """Sequences start … start + size − 1 of the endless stream of epochs over `data` (N, S), each epoch shuffled."""
    count = len(data)
    rows = [_permutation(count, seed, i // count)[i % count] for i in range(start, start + size)]
    return Batch.of_rows(data, torch.stack(rows))


def in_order(data: Tensor, size: int) -> Iterator[Batch]:
    """`data` (N, S) once, in batches of `size` sequences; the last may be smaller."""
    for rows in torch.arange(len(data)).split(size):
        yield Batch.of_rows(data, rows)


def sequences_of(name: str, batches: Tensor | Iterable[Any], vocabulary: int) -> Tensor:
    """All sequences of `batches`, (N, S) or many (B, S), as one (N, S) int64 tensor on the CPU.

    Raises ValueError naming `name` for what is no such token ids below `vocabulary`.
    """
    return torch.cat(check_token_batches(name, [batches] if isinstance(batches, Tensor) else batches, vocabulary))
