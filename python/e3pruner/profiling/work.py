"""What the operators compute and move: FLOPs and bytes of each named range."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop

from e3kernels.profiling import RangeRecorder

_FLOPS = dict(flop_registry)
_FLOPS.setdefault(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop)


class Work(NamedTuple):
    """FLOPs of matrix products and attention, 2 a multiply-add; bytes of the tensors that operators read and write."""

    flops: int
    bytes: int


class WorkCounter(TorchDispatchMode):
    """Counts, inside its `with` block, the work of every operator under the path of ranges open in `recorder`.

    The bytes are those of an operator's tensor arguments and results: what must pass if nothing stays in a cache.
    Operators that only look at memory in another shape move none.
    """

    def __init__(self, recorder: RangeRecorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.work: dict[tuple[str, ...], Work] = defaultdict(lambda: Work(0, 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = _FLOPS.get(func._overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
        path = tuple(self.recorder.open)
        before = self.work[path]
        self.work[path] = Work(before.flops + flops, before.bytes + _traffic(func, (args, kwargs), out))
        return out


# These only look at memory in another shape, as views do, but are not declared so.
_NO_TRAFFIC = (torch.ops.aten._unsafe_view, torch.ops.aten._reshape_alias)
# These read as much of their table as they write.
_ROW_READERS = (torch.ops.aten.embedding, torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.gather)


def _traffic(func: Any, inputs: Any, out: Any) -> int:
    if func.is_view or func._overloadpacket in _NO_TRAFFIC:
        return 0
    if func._overloadpacket in _ROW_READERS:
        return 2 * sum(t.nbytes for t in _tensors(out))
    return sum(t.nbytes for t in _tensors((*inputs, out)))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(values.values())
    elif isinstance(values, Iterable) and not isinstance(values, str):
        for value in values:
            yield from _tensors(value)
