"""The order in which training sequences are read: a function of (seed, position), so that a resume needs no state."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from e3pruner.text.sequences import Rows, as_sequences


class Batch(NamedTuple):
    """`input_ids` (B, S) int64; `labels` (B, S − 1): the token to predict at each position but the last, or `IGNORED`.

    `rows` (B,): which sequences of the training data they are, for a teacher that stores its predictions.
    `attention_mask` (B, S): 0 on padding; None: there is none. `position_ids` (B, S): of packed documents.
    """

    input_ids: Tensor
    labels: Tensor
    rows: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    @staticmethod
    def of_rows(data: Rows, rows: Tensor) -> Batch:
        """Sequences `rows` of `data`."""
        some = as_sequences(data)[rows]
        return Batch(some.input_ids, some.targets, rows, some.attention_mask, some.position_ids)

    def to(self, device: torch.device) -> Batch:
        moved = {name: t.to(device) for name, t in self._asdict().items() if t is not None and name != "rows"}
        return self._replace(**moved)


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(size))


def shuffled_batch(data: Rows, start: int, size: int, seed: int) -> Batch:
    """Sequences start … start + size − 1 of the endless stream of epochs over `data`, each epoch shuffled."""
    count = len(data)
    rows = [_permutation(count, seed, i // count)[i % count] for i in range(start, start + size)]
    return Batch.of_rows(data, torch.stack(rows))


def in_order(data: Rows, size: int) -> Iterator[Batch]:
    """`data` (N, S) once, in batches of `size` sequences; the last may be smaller."""
    for rows in torch.arange(len(data)).split(size):
        yield Batch.of_rows(data, rows)
