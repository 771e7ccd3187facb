"""Linear losses tile by tile: logits exist for a few rows at a time, whatever N and V.

For each tile of rows: project hidden states to logits, let a dense kernel turn the tile into loss, statistics and the
gradient of Σℓ, and take that gradient back to hidden states, weight and bias. The mean's 1/Σw is known only after the
last tile; it is applied to the gradients, which are small beside the logits. Every backend uses this loop with its own
dense kernel. Where a weight must be cast, or its gradient is a product in a narrower dtype than its sum, the work goes
by blocks of the vocabulary, so that no second copy of the weight ever exists. CUDA's products of a narrow dtype add to
an fp32 sum by themselves, unrounded and in one call: there a head that learns gets tiles of so many rows that the
product takes longer than reading and writing the sum.

A tile of few rows reads the head, and reads and writes its gradient, once for few products. But until the first tile's
products are summed, the gradient of the weight is memory that holds nothing: 4·V·H bytes, room for the logits of both
models at H/2 rows in fp32, at H rows in bf16. The first tile's logits lie there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from e3kernels.contract import REDUCTIONS, accumulate_dtype
from e3kernels.reference.token_loss import denominator, valid_tokens

# Logits of one model in a tile of the reference kernels: their temporaries come to about 60 bytes per logit.
REFERENCE_LOGITS = 4 << 20
# Bytes of a weight that are cast, or of its gradient that are multiplied out, at a time.
_BLOCK_BYTES = 8 << 20
# Tiles of as many rows and more hold a multiple of them: what the products' kernels take at a time, and part of it.
_ROW_MULTIPLES = (48, 16)


def product_dtype(hidden: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of products: `compute_dtype` (autocast's), else that of `hidden`.

    On the CPU fp16 is multiplied in fp32: as fast there, and rounded logits cost a gradient more than
    its own rounding.
    """
    if compute_dtype is None and hidden.dtype == torch.float16 and hidden.device.type == "cpu":
        return torch.float32
    return compute_dtype or hidden.dtype


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden @ weight.T + bias, all of one dtype, written to `out`."""
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def linear_grad_hidden(grad: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """grad @ weight, all of one dtype, written to `out`."""
    return torch.mm(grad, weight, out=out)


def adds_products(narrow: Tensor, total: Tensor) -> bool:
    """Whether a product of matrices like `narrow` can be added to `total` in the dtype of `total`, in one call."""
    if narrow.dtype == total.dtype:
        return True
    return narrow.device.type == "cuda" and torch.version.hip is None and total.dtype == torch.float32


def add_product(total: Tensor, first: Tensor, second: Tensor, beta: float) -> None:
    """total = beta·total + first @ second, summed in the dtype of `total`, as `adds_products` allows; without beta
    whatever `total` holds."""
    if first.dtype == total.dtype:
        total.addmm_(first, second, beta=beta)
    else:
        torch.addmm(total, first, second, out_dtype=total.dtype, beta=beta, out=total)


class Products(NamedTuple):
    """The two products of a few rows with a whole head."""

    logits: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor] = linear_logits
    grad_hidden: Callable[[Tensor, Tensor, Tensor], Tensor] = linear_grad_hidden


def _whole(rows: int) -> int:
    """As many of the rows as the products' kernels like."""
    return next((rows // multiple * multiple for multiple in _ROW_MULTIPLES if rows >= multiple), rows)


class TileKernel(NamedTuple):
    """The dense operation on one tile of logits: forward and backward with the operators' arguments, and how many
    fp32 logits of one model a tile may hold for the kernel's temporaries to stay in its workspace. The gradient may
    replace the student's logits. A `lean` kernel has no temporaries but the logits: of a narrower dtype it takes more.
    Where products are added to the sum of a weight's gradient in one call, a tile has `added_rows` rows at least.
    `share` begins to sum the gradient of a tile's hidden states over ranks that share out the vocabulary, in its place;
    what it returns waits for the sum.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., Tensor]
    logits: int
    lean: bool = False
    added_rows: int = 0
    share: Callable[[Tensor], Callable[[], None]] | None = None
    products: Products = Products()

    def rows(self, vocabulary: int, dtype: torch.dtype) -> int:
        """Rows of a tile whose logits have `dtype`."""
        return max(1, _whole(self.logits * (4 if self.lean else dtype.itemsize) // dtype.itemsize // vocabulary))


class Head(NamedTuple):
    """Hidden states (N, H) with the output head that makes them logits; products are computed in `dtype`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    products: Products

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        vocabulary, width = self.weight.shape
        stop = vocabulary if stop is None else stop
        step = max(1, _BLOCK_BYTES // (width * self.weight.element_size()))
        return (slice(first, min(first + step, stop)) for first in range(start, stop, step))

    def project(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Logits (rows, V) of `hidden` (rows, H), written to `out`."""
        hidden = hidden.to(self.dtype)
        if self.weight.dtype == self.dtype:
            bias = None if self.bias is None else self.bias.to(self.dtype)
            return self.products.logits(hidden, self.weight, bias, out)
        for block in self.blocks():
            bias = None if self.bias is None else self.bias[block].to(self.dtype)
            out[:, block] = F.linear(hidden, self.weight[block].to(self.dtype), bias)
        return out


def _pack_columns(matrix: Tensor, columns: int) -> Tensor:
    """The first columns of a contiguous matrix, made contiguous at the front of its own memory."""
    packed = matrix.view(-1)[: len(matrix) * columns].view(-1, columns)
    step = max(1, _BLOCK_BYTES // (columns * matrix.element_size()))
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        packed[rows] = matrix[rows, :columns].clone()  # the rows below have not moved yet, and lie further back
    return packed


class HeadGradients:
    """Gradients of a head's hidden states, weight and bias, summed over tiles; None for those not needed.

    Where `valid` (N,), if given, is false, the hidden states may hold anything.
    """

    def __init__(
        self,
        head: Head,
        needs: tuple[bool, bool, bool],
        valid: Tensor | None = None,
        share: Callable[[Tensor], Callable[[], None]] | None = None,
    ) -> None:
        self.head = head
        self.valid = valid
        self.share = share
        self._shared: Callable[[], None] | None = None  # waits for the last tile's gradient of the hidden states
        dtype = accumulate_dtype(head.hidden.dtype)
        need_hidden, need_weight, need_bias = needs
        contiguous = torch.contiguous_format
        self.hidden = torch.empty_like(head.hidden, memory_format=contiguous) if need_hidden else None
        self.weight = torch.empty_like(head.weight, dtype=dtype, memory_format=contiguous) if need_weight else None
        self.bias = torch.zeros_like(head.bias, dtype=dtype) if need_bias and head.bias is not None else None
        self._begun = False  # until then the weight's gradient holds nothing

    def adds_narrow(self) -> bool:
        """Whether products of a narrower dtype are added to the weight's gradient whole."""
        if self.weight is None or self.head.dtype == self.weight.dtype:
            return False
        return adds_products(self.head.hidden.new_empty(0, dtype=self.head.dtype), self.weight)

    def room(self) -> int:
        """Rows of logits of two models for which there is room in the weight's gradient before anything is added."""
        return 0 if self.weight is None else self._memory().numel() // (2 * len(self.weight))

    def workspace(self, rows: int) -> Tensor:
        """(rows, V) in the memory of the weight's gradient; what is added first may lie at the front of it."""
        vocabulary = len(self.head.weight)
        return self._memory()[: rows * vocabulary].view(rows, vocabulary)

    def _memory(self) -> Tensor:
        assert self.weight is not None
        return self.weight.view(-1).view(self.head.dtype)

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        head, grad = self.head, grad_logits.to(self.head.dtype)
        if self.hidden is not None:
            self._through_weight(grad, self.hidden[rows])
            self._begin_sharing(self.hidden[rows])
        if self.bias is not None:
            self.bias += grad.sum(0, dtype=self.bias.dtype)
        if self.weight is not None:
            hidden = head.hidden[rows].to(head.dtype)
            if self.valid is not None:  # the gradient of its logits is 0, which makes a NaN of NaN and infinity
                hidden = torch.where(self.valid[rows, None], hidden, 0.0)
            self._add_weight(grad, hidden)
        self._begun = True

    def _begin_sharing(self, hidden: Tensor) -> None:
        """Sum over the ranks while the next tile is computed: one tile's sum is under way at a time."""
        if self.share is not None:
            self._finish_sharing()
            self._shared = self.share(hidden)

    def _finish_sharing(self) -> None:
        if self._shared is not None:
            self._shared()
            self._shared = None

    def _through_weight(self, grad: Tensor, out: Tensor) -> None:
        """grad @ weight to `out`."""
        weight = self.head.weight
        if weight.dtype == grad.dtype == out.dtype:
            self.head.products.grad_hidden(grad, weight, out)
            return
        total = torch.zeros_like(out, dtype=accumulate_dtype(grad.dtype))
        for block in self.head.blocks():
            total += grad[:, block] @ weight[block].to(grad.dtype)
        out.copy_(total)

    def _add_weight(self, grad: Tensor, hidden: Tensor) -> None:
        """Where `grad` lies at the front of the sum's own memory, at most half of it, the rows of the sum behind it
        come first; then the columns of `grad` that the other rows need are packed, and so on."""
        assert self.weight is not None
        count, stop = grad.shape
        row_bytes = self.weight.shape[1] * self.weight.element_size()
        while grad.data_ptr() == self.weight.data_ptr():
            below = -(-count * stop * grad.element_size() // row_bytes)
            self._add_products(grad, hidden, below, stop)
            stop = below
            few = stop == 1 or count * stop * grad.element_size() <= _BLOCK_BYTES
            grad = grad[:, :stop].clone() if few else _pack_columns(grad, stop)
        self._add_products(grad, hidden, 0, stop)

    def _add_products(self, grad: Tensor, hidden: Tensor, start: int, stop: int) -> None:
        """gradᵀ·hidden to the rows [start, stop) of the weight's gradient."""
        assert self.weight is not None
        if adds_products(grad, self.weight):
            add_product(self.weight[start:stop], grad[:, start:stop].t(), hidden, float(self._begun))
            return
        for block in self.head.blocks(start, stop):
            part = grad[:, block].t() @ hidden
            self.weight[block] = self.weight[block] + part if self._begun else part

    def results(self, divisor: Tensor | None = None) -> tuple[Tensor, ...]:
        """The three gradients over `divisor`; an empty tensor for each that was not needed."""
        like = self.head.hidden
        wide = accumulate_dtype(like.dtype)
        self._finish_sharing()
        if self.weight is not None and not self._begun:
            self.weight.zero_()
        gradients = (self.hidden, self.weight, self.bias)
        if divisor is not None:
            for gradient in gradients:
                if gradient is not None:
                    gradient /= divisor
        return tuple(
            like.new_empty(0, dtype=dtype) if gradient is None else gradient
            for gradient, dtype in zip(gradients, (like.dtype, wide, wide), strict=True)
        )


@dataclass(frozen=True)
class LinearLoss:
    """A linear loss: the student's head, its needs, and what makes a tile.

    `tile(rows, workspace)` gives (student logits, the dense operator's teacher tensors) of a slice of rows; the logits
    of the `models` that it projects lie one below the other in the workspace. `codes` are the dense operator's
    arguments from `scalars` on, without the reduction.
    """

    head: Head
    models: int
    tile: Callable[[slice, Tensor], tuple[Tensor, tuple[Tensor, ...]]]
    labels: Tensor | None
    token_mask: Tensor | None
    codes: tuple[Any, ...]
    needs: tuple[bool, bool, bool]
    kernel: TileKernel

    def _gradients(self, needs: tuple[bool, bool, bool]) -> HeadGradients:
        valid = None
        if self.labels is not None or self.token_mask is not None:
            _, _, _, ignore_index, *_ = self.codes
            valid = valid_tokens(self.head.hidden, self.labels, self.token_mask, ignore_index)
        return HeadGradients(self.head, needs, valid, self.kernel.share)

    def _workspaces(self, gradients: HeadGradients) -> Iterator[tuple[slice, Tensor]]:
        """Each slice of rows with the memory for its logits."""
        vocabulary, count = len(self.head.weight), len(self.head.hidden)
        step, first = self.kernel.rows(vocabulary, self.head.dtype), 0
        if gradients.adds_narrow():
            step = max(step, self.kernel.added_rows)
        if self.kernel.lean and (room := min(gradients.room(), count)) > step:
            first = room if room == count else _whole(room)
            yield slice(0, first), gradients.workspace(self.models * first)
        if first == count:
            return
        step = min(step, count - first)
        workspace = self.head.hidden.new_empty(self.models * step, vocabulary, dtype=self.head.dtype)
        for start in range(first, count, step):
            rows = slice(start, min(start + step, count))
            yield rows, workspace[: self.models * (rows.stop - start)]

    def _tiles(self, gradients: HeadGradients) -> Iterator[tuple[slice, tuple[Any, ...]]]:
        """Each slice of rows with the dense operator's inputs for it."""
        for rows, workspace in self._workspaces(gradients):
            student, teacher = self.tile(rows, workspace)
            tokens = (None if tensor is None else tensor[rows] for tensor in (self.labels, self.token_mask))
            yield rows, (student, *teacher, *tokens, *self.codes)

    def forward(self, reduction: int, num_items: Tensor | None) -> tuple[Tensor, ...]:
        """(loss, stats, gradients of hidden, weight, bias) of the linear operator."""
        name = REDUCTIONS[reduction]
        per_tile = REDUCTIONS.index("none" if name == "none" else "sum")
        hidden = self.head.hidden
        count, dtype = len(hidden), accumulate_dtype(hidden.dtype)
        losses, stats = hidden.new_zeros(count, dtype=dtype), hidden.new_empty((4, count), dtype=dtype)
        needs = self.needs if name != "none" else (False, False, False)
        gradients = self._gradients(needs)
        for rows, inputs in self._tiles(gradients):
            # A summed tile puts its loss into its first row; the sum over rows is the same.
            loss, stats[:, rows], grad = self.kernel.forward(*inputs, per_tile, None, any(needs))
            losses[rows if name == "none" else rows.start] = loss
            if any(needs):
                gradients.add(rows, grad)
        if name == "none":
            return losses, stats, *gradients.results()
        divisor = denominator(stats, name, num_items)
        return losses.sum() / divisor, stats, *gradients.results(divisor)

    def backward(self, grad_loss: Tensor) -> tuple[Tensor, ...]:
        """Gradients of hidden, weight, bias for one incoming gradient per token."""
        gradients = self._gradients(self.needs)
        for rows, inputs in self._tiles(gradients):
            gradients.add(rows, self.kernel.backward(grad_loss[rows], *inputs))
        return gradients.results()


def kernels(
    linear_loss: Callable[..., LinearLoss], kernel: TileKernel
) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
    """Forward and backward kernels of the linear operator whose arguments `linear_loss(kernel, needs, …)` takes.

    Autocast has already chosen the operator's compute dtype; inside, it would cast the sums too.
    """

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *inputs, reduction, num_items, need_hidden, need_weight, need_bias = arguments
        with torch.autocast(inputs[0].device.type, enabled=False):
            return linear_loss(kernel, (need_hidden, need_weight, need_bias), *inputs).forward(reduction, num_items)

    def backward(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *inputs, need_hidden, need_weight, need_bias = arguments
        with torch.autocast(inputs[0].device.type, enabled=False):
            return linear_loss(kernel, (need_hidden, need_weight, need_bias), *inputs).backward(grad_loss)

    return forward, backward
