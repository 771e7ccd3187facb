"""The losses as modules: options at construction, tensors in the call. The formulas are in `e3kernels.ops`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack, overload

from torch import Tensor, nn

from e3kernels.ops.common.keywords import (
    BatchKeywords,
    DenseKeywords,
    HeadsKeywords,
    LossKeywords,
    StoredKeywords,
    StudentHeadKeywords,
)
from e3kernels.ops.common.loss_call import LossResult, TokenStats
from e3kernels.ops.entropy_kl import entropy_kl
from e3kernels.ops.linear_entropy_kl import linear_entropy_kl
from e3kernels.ops.linear_topk_kl import linear_topk_kl
from e3kernels.ops.topk_kl import topk_kl


class DistillationLoss(nn.Module):
    """A loss with the options that are given here, each of `keywords`; TypeError for any other.

    The call takes the function's tensors, what changes from batch to batch (token_mask, num_items, group, biases of
    heads), and return_stats.
    """

    loss: ClassVar[Callable[..., LossResult]]
    keywords: ClassVar[type] = LossKeywords

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = self.keywords.__annotations__
        for name in options:
            if name not in known:
                raise TypeError(f"{type(self).__name__} has no option {name!r}; its options are {', '.join(known)}")
        self.options = options

    def forward(self, *tensors: Tensor | None, **batch: Any) -> LossResult:
        return self.loss(*tensors, **self.options, **batch)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class EntropyKLLoss(DistillationLoss):
    """`e3kernels.entropy_kl` as a module."""

    loss = staticmethod(entropy_kl)
    keywords = DenseKeywords

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[DenseKeywords]) -> None: ...
        @overload
        def __call__(
            self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *,
            return_stats: Literal[False] = False, **batch: Unpack[BatchKeywords],
        ) -> Tensor: ...  # fmt: skip
        @overload
        def __call__(
            self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *,
            return_stats: Literal[True], **batch: Unpack[BatchKeywords],
        ) -> tuple[Tensor, TokenStats]: ...  # fmt: skip
        def __call__(self, *tensors: Any, **batch: Any) -> Any: ...


class TopkKLLoss(DistillationLoss):
    """`e3kernels.topk_kl` as a module."""

    loss = staticmethod(topk_kl)
    keywords = StoredKeywords

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[StoredKeywords]) -> None: ...
        @overload
        def __call__(
            self, student_logits: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor,
            labels: Tensor | None = None, *,
            return_stats: Literal[False] = False, **batch: Unpack[BatchKeywords],
        ) -> Tensor: ...  # fmt: skip
        @overload
        def __call__(
            self, student_logits: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor,
            labels: Tensor | None = None, *,
            return_stats: Literal[True], **batch: Unpack[BatchKeywords],
        ) -> tuple[Tensor, TokenStats]: ...  # fmt: skip
        def __call__(self, *tensors: Any, **batch: Any) -> Any: ...


class LinearEntropyKLLoss(DistillationLoss):
    """`e3kernels.linear_entropy_kl` as a module; the heads stay with their models."""

    loss = staticmethod(linear_entropy_kl)
    keywords = DenseKeywords

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[DenseKeywords]) -> None: ...
        @overload
        def __call__(
            self, student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
            labels: Tensor | None = None, *,
            return_stats: Literal[False] = False, **batch: Unpack[HeadsKeywords],
        ) -> Tensor: ...  # fmt: skip
        @overload
        def __call__(
            self, student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
            labels: Tensor | None = None, *,
            return_stats: Literal[True], **batch: Unpack[HeadsKeywords],
        ) -> tuple[Tensor, TokenStats]: ...  # fmt: skip
        def __call__(self, *tensors: Any, **batch: Any) -> Any: ...


class LinearTopkKLLoss(DistillationLoss):
    """`e3kernels.linear_topk_kl` as a module; the head stays with its model."""

    loss = staticmethod(linear_topk_kl)
    keywords = StoredKeywords

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[StoredKeywords]) -> None: ...
        @overload
        def __call__(
            self, student_hidden: Tensor, student_weight: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor,
            labels: Tensor | None = None, *,
            return_stats: Literal[False] = False, **batch: Unpack[StudentHeadKeywords],
        ) -> Tensor: ...  # fmt: skip
        @overload
        def __call__(
            self, student_hidden: Tensor, student_weight: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor,
            labels: Tensor | None = None, *,
            return_stats: Literal[True], **batch: Unpack[StudentHeadKeywords],
        ) -> tuple[Tensor, TokenStats]: ...  # fmt: skip
        def __call__(self, *tensors: Any, **batch: Any) -> Any: ...
