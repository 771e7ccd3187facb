"""The order in which training sequences are read: a function of (seed, position), so that a resume needs no state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from e3pruner.text.sequences import Rows, as_sequences


class Batch(NamedTuple):
    """`input_ids` (B, S) int64; `labels` (B, S − 1): the token to predict at each position but the last, or `IGNORED`.

    `rows` (B,): which sequences of the training data they are, for a teacher that stores its predictions.
    `attention_mask` (B, S): 0 on padding; None: there is none. `position_ids` (B, S): of packed documents. `extras`:
    images and what else the rows hold beside tokens, by the names of a model's arguments.
    """

    input_ids: Tensor
    labels: Tensor
    rows: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    extras: Mapping[str, Tensor] | None = None

    @property
    def inputs(self) -> dict[str, Tensor | None]:
        """The arguments of a model's forward pass."""
        own = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "position_ids": self.position_ids}
        return {**own, **(self.extras or {})}

    @staticmethod
    def of_rows(data: Rows, rows: Tensor) -> Batch:
        """Sequences `rows` of `data`."""
        some = as_sequences(data)[rows]
        extras = None if some.extras is None else some.extras.inputs
        return Batch(some.input_ids, some.targets, rows, some.attention_mask, some.position_ids, extras)

    def to(self, device: torch.device) -> Batch:
        moved = {n: each.to(device) for n, each in self._asdict().items() if isinstance(each, Tensor) and n != "rows"}
        extras = None if self.extras is None else {name: each.to(device) for name, each in self.extras.items()}
        return self._replace(**moved, extras=extras)


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
