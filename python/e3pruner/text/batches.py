"""The order in which training sequences are read: a function of (seed, position), so that a resume needs no state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from e3pruner.models.tokens import check_token_batches
from e3pruner.storage import fingerprint

IGNORED = -100


@dataclass(frozen=True, eq=False)
class Packed:
    """Documents packed into rows. `input_ids` (N, S) int64; `position_ids` (N, S): each token's position in its
    document, by which attention tells the documents apart; `labels` (N, S − 1): the token to predict at each position
    but the last, or `IGNORED`. Raises ValueError if the shapes do not fit, or a row has nothing to predict.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        rows, length = self.input_ids.shape
        for name, shape in (("position_ids", (rows, length)), ("labels", (rows, length - 1))):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}; input_ids ask for {shape}")
        if not (some := (self.labels != IGNORED).any(-1)).all():
            raise ValueError(f"labels: row {int(some.int().argmin())} has nothing to predict; leave it out")

    def __len__(self) -> int:
        return len(self.input_ids)


Sequences = Tensor | Packed


def tokens_of(data: Sequences) -> Tensor:
    """The token ids (N, S)."""
    return data.input_ids if isinstance(data, Packed) else data


def data_identity(data: Sequences) -> str:
    return fingerprint(vars(data) if isinstance(data, Packed) else data)


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
    def of_rows(data: Sequences, rows: Tensor) -> Batch:
        """Sequences `rows` of `data`; of token ids (N, S) every one but the first is to be predicted."""
        if isinstance(data, Packed):
            return Batch(data.input_ids[rows], data.labels[rows], rows, None, data.position_ids[rows])
        input_ids = data[rows]
        return Batch(input_ids, input_ids[:, 1:], rows)

    def to(self, device: torch.device) -> Batch:
        moved = {name: t.to(device) for name, t in self._asdict().items() if t is not None and name != "rows"}
        return self._replace(**moved)


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(size))


def shuffled_batch(data: Sequences, start: int, size: int, seed: int) -> Batch:
    """Sequences start … start + size − 1 of the endless stream of epochs over `data`, each epoch shuffled."""
    count = len(data)
    rows = [_permutation(count, seed, i // count)[i % count] for i in range(start, start + size)]
    return Batch.of_rows(data, torch.stack(rows))


def in_order(data: Sequences, size: int) -> Iterator[Batch]:
    """`data` (N, S) once, in batches of `size` sequences; the last may be smaller."""
    for rows in torch.arange(len(data)).split(size):
        yield Batch.of_rows(data, rows)


def sequences_of(name: str, batches: Sequences | Iterable[Any], vocabulary: int) -> Any:
    """All sequences of `batches`, (N, S) or many (B, S), as one (N, S) int64 tensor on the CPU; `Packed` as it is.

    Raises ValueError naming `name` for what is no such token ids below `vocabulary`.
    """
    if isinstance(batches, Packed):
        check_token_batches(name, [batches.input_ids], vocabulary)
        return batches
    return torch.cat(check_token_batches(name, [batches] if isinstance(batches, Tensor) else batches, vocabulary))
