"""The calibration text of a search: parts that take one short forward pass each, shared by the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from e3pruner.mask_search.ranks import Ranks
from e3pruner.text.sequences import Rows, as_sequences

_PASS_TOKENS = 512  # of one forward pass: enough to tell good masks from bad ones, so that a step need not cost more


class Calibration:
    """The given batches, (B, T) each, as `batches` that a forward pass is short for, and means over their tokens.

    Of batches with labels only the positions that predict one count, of padded ones those that are no padding.

    Under `torch.distributed` each rank has its own share of every batch, as large as the others'; a pass is as long
    over all ranks as on one. Raises `RuntimeError` where the ranks' batches differ in number or shape.
    """

    def __init__(self, batches: Iterable[Rows], device: torch.device) -> None:
        self.ranks = Ranks(device)
        length = max(1, _PASS_TOKENS // self.ranks.count)
        given = [part for batch in batches for part in as_sequences(batch).split(max(1, length // batch.shape[1]))]
        self.ranks.check_equal("the batches (their number and shapes)", [list(part.shape) for part in given])
        self.batches = [part.trimmed() for part in given]
        # Tokens of each batch, by kind: of this rank, and of all.
        self._own = {
            "text": [int(part.text.sum()) for part in self.batches],
            "counted": [int(part.counted.sum()) for part in self.batches],
            "predicted": [len(part.predicted) for part in self.batches],
        }
        self.sizes = {kind: [int(total) for total in self.ranks.sum(sizes)] for kind, sizes in self._own.items()}

    @property
    def tokens(self) -> int:
        """Tokens whose predictions count."""
        return sum(self.sizes["counted"])

    @property
    def identity(self) -> list[str]:
        """A hash of each batch, of all ranks."""
        own = [int(batch.identity[:12], 16) for batch in self.batches]  # 48 bits pass through fp64
        return [f"{int(each):012x}" for rank in self.ranks.gather(own) for each in rank]

    def mean(self, table: Sequence[Sequence[float]], batches: Sequence[int], over: str = "counted") -> list[float]:
        """The mean of the rows of `table`, one for each of `batches`, weighted by their tokens: those that are
        "counted" or "predicted" (see `Sequences`)."""
        sizes = [self.sizes[over][batch] for batch in batches]
        shares = [size / sum(sizes) for size in sizes]
        return [sum(a * b for a, b in zip(shares, column, strict=True)) for column in zip(*table, strict=True)]

    def over_ranks(self, means: Sequence[float], batch: int, over: str) -> list[float]:
        """The means over a batch of all ranks, given this rank's: each counts by its tokens."""
        share = self.ranks.count * self._own[over][batch] / self.sizes[over][batch]  # 1 where all have as many
        return [total / self.ranks.count for total in self.ranks.sum([share * mean for mean in means])]
