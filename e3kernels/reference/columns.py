"""The vocabulary of logits (N, V): which of its columns a tensor holds, and what is taken over all of them."""

from collections.abc import Callable

import torch
from torch import Tensor


class Columns:
    """All V columns, in one tensor."""

    start = 0  # the first column held

    def count(self, z: Tensor) -> int:
        """V, for logits `z` (N, columns held)."""
        return z.shape[-1]

    def total(self, values: Tensor) -> Tensor:
        """The sum over all columns of `values` that are sums over those held."""
        return values

    def parts(self, values: Tensor, join: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, parts, …): statistics of the parts that make up a row, of `values` (N, parts held, …). `join` makes one
        part (N, …) of those held."""
        return values

    def normaliser(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(m, log Σ e^{z − m}) of each row, each (N, 1), m finite and its largest logit if that is. Apart, since beside
        an m of 1e38 their sum has no room for the second."""
        largest = z.amax(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
        return largest, (z - largest).logsumexp(-1, keepdim=True)

    def log_softmax(self, z: Tensor) -> Tensor:
        """The logarithm of the softmax of each row, at the columns held."""
        return torch.log_softmax(z, -1)

    def softmax(self, z: Tensor) -> Tensor:
        """The softmax of each row, at the columns held."""
        return z.softmax(-1)

    def locate(self, z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where in `z` the columns `ids` are, and whether they are held: elsewhere the index is any legal one."""
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def gather(self, z: Tensor, ids: Tensor) -> Tensor:
        """The columns `ids` (N, k) of `z`, whoever holds them."""
        index, held = self.locate(z, ids)
        return self.total(torch.where(held, z.gather(-1, index), 0.0))

    def scatter_add(self, z: Tensor, ids: Tensor, values: Tensor) -> Tensor:
        """`z`, to whose columns `ids` (N, k) `values` (N, k) are added where they are held."""
        index, held = self.locate(z, ids)
        return z.scatter_add_(-1, index, torch.where(held, values, 0.0))


WHOLE = Columns()
