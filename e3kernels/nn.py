"""The losses as modules: options at construction, tensors in the call. The formulas are in `e3kernels.ops`."""

from typing import Any

from torch import Tensor, nn

from e3kernels.ops.common.loss_call import LossResult
from e3kernels.ops.entropy_kl import entropy_kl
from e3kernels.ops.linear_entropy_kl import linear_entropy_kl
from e3kernels.ops.linear_topk_kl import linear_topk_kl
from e3kernels.ops.topk_kl import topk_kl


class DistillationLoss(nn.Module):
    """The options that all losses have in common; see `e3kernels.entropy_kl`."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        weighting: str = "entropy",
        gamma: float = 1.0,
        kd_ratio: float = 1.0,
        divergence: str = "forward",
        beta: float = 0.5,
        ignore_index: int = -100,
        student_softcap: float | None = None,
        student_scale: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "weighting": weighting,
            "gamma": gamma,
            "kd_ratio": kd_ratio,
            "divergence": divergence,
            "beta": beta,
            "ignore_index": ignore_index,
            "student_softcap": student_softcap,
            "student_scale": student_scale,
            "reduction": reduction,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class _DenseTeacherLoss(DistillationLoss):
    def __init__(self, *, teacher_softcap: float | None = None, teacher_scale: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.options |= {"teacher_softcap": teacher_softcap, "teacher_scale": teacher_scale}


class _StoredTeacherLoss(DistillationLoss):
    def __init__(self, *, tail: str = "bucket", **options: Any) -> None:
        super().__init__(**options)
        self.options["tail"] = tail


class EntropyKLLoss(_DenseTeacherLoss):
    """`e3kernels.entropy_kl` as a module."""

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, **call: Any
    ) -> LossResult:
        """The loss; `call` holds what changes from batch to batch: token_mask, num_items."""
        return entropy_kl(student_logits, teacher_logits, labels, **self.options, **call)


class TopkKLLoss(_StoredTeacherLoss):
    """`e3kernels.topk_kl` as a module."""

    def forward(
        self,
        student_logits: Tensor,
        teacher_logprobs: Tensor,
        teacher_ids: Tensor,
        labels: Tensor | None = None,
        **call: Any,
    ) -> LossResult:
        """The loss; `call` holds what changes from batch to batch: token_mask, num_items."""
        return topk_kl(student_logits, teacher_logprobs, teacher_ids, labels, **self.options, **call)


class LinearEntropyKLLoss(_DenseTeacherLoss):
    """`e3kernels.linear_entropy_kl` as a module; the heads stay with their models."""

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        **call: Any,
    ) -> LossResult:
        """The loss; `call` holds token_mask, num_items, student_bias, teacher_bias."""
        return linear_entropy_kl(
            student_hidden, student_weight, teacher_hidden, teacher_weight, labels, **self.options, **call
        )


class LinearTopkKLLoss(_StoredTeacherLoss):
    """`e3kernels.linear_topk_kl` as a module; the head stays with its model."""

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_logprobs: Tensor,
        teacher_ids: Tensor,
        labels: Tensor | None = None,
        **call: Any,
    ) -> LossResult:
        """The loss; `call` holds token_mask, num_items, student_bias."""
        return linear_topk_kl(
            student_hidden, student_weight, teacher_logprobs, teacher_ids, labels, **self.options, **call
        )
