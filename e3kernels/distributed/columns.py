"""The vocabulary in parts: rank r of a process group holds the columns from V_0 + … + V_{r−1} on.

Sums over the vocabulary are all-reduced; what crosses the wire is a few numbers per token, never a logit. A softmax is
normalised by the all-reduced maximum and sum, log softmax z = (z − m) − log Σ e^{z − m}.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from e3kernels.contract import accumulate_dtype
from e3kernels.reference.columns import Columns

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ShardedColumns(Columns):
    """The columns `start` … `start` + width − 1 of `size`; `widest` is the most that a rank holds.

    Every rank of `group` must make it, and call its methods, together; `tokens` must be the same on all.
    Raises ValueError on all ranks if it is not, or if one of them holds no column.
    """

    def __init__(self, group: ProcessGroup, width: int, tokens: int, device: torch.device) -> None:
        self.group = group
        own = torch.tensor([width, tokens], device=device)
        gathered = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(gathered, own, group=group)
        widths: list[int]
        counts: list[int]
        widths, counts = torch.stack(gathered).t().tolist()
        if len(set(counts)) > 1:
            raise ValueError(f"group: its ranks hold {counts} tokens; each must hold its columns of the same ones")
        if min(widths) < 1:
            raise ValueError(f"group: its ranks hold {widths} columns of the vocabulary; each must hold at least one")
        self.start, self.size, self.widest = sum(widths[: group.rank()]), sum(widths), max(widths)

    def count(self, z: Tensor) -> int:
        return self.size

    def total(self, values: Tensor) -> Tensor:
        values = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(values, group=self.group)
        return values

    def begin_total(self, values: Tensor) -> Callable[[], None]:
        """Begin to replace `values` by their total, summed in fp32 or wider; what is returned waits for it."""
        wide = values.to(accumulate_dtype(values.dtype), memory_format=torch.contiguous_format, copy=True)
        work = dist.all_reduce(wide, group=self.group, async_op=True)

        def finish() -> None:
            work.wait()
            values.copy_(wide)

        return finish

    def parts(self, values: Tensor, join: Callable[[Tensor], Tensor]) -> Tensor:
        own = join(values)
        gathered = [torch.empty_like(own) for _ in range(self.group.size())]
        dist.all_gather(gathered, own, group=self.group)
        return torch.stack(gathered, 1)

    def normaliser(self, z: Tensor) -> tuple[Tensor, Tensor]:
        largest = z.amax(-1, keepdim=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        largest.clamp_(min=torch.finfo(z.dtype).min)  # of no finite logit at all the sum is 0, not NaN
        return largest, self.total((z - largest).exp().sum(-1, keepdim=True)).log()

    def log_softmax(self, z: Tensor) -> Tensor:
        largest, log_sum = self.normaliser(z)
        return (z - largest) - log_sum

    def softmax(self, z: Tensor) -> Tensor:
        return self.log_softmax(z).exp()

    def locate(self, z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        index = ids - self.start
        return index.clamp(0, z.shape[-1] - 1), (index >= 0) & (index < z.shape[-1])
