"""The keyword arguments of the losses, as types: what their overloads and their module forms take."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LossKeywords(TypedDict, total=False):
    """What all losses have in common; see `e3kernels.entropy_kl`."""

    temperature: float
    weighting: str
    gamma: float
    kd_ratio: float
    divergence: str
    beta: float
    ignore_index: int
    student_softcap: float | None
    student_scale: float
    reduction: str


class DenseKeywords(LossKeywords, total=False):
    """The options against a dense teacher."""

    teacher_softcap: float | None
    teacher_scale: float


class StoredKeywords(LossKeywords, total=False):
    """The options against stored predictions; see `e3kernels.topk_kl`."""

    tail: str


class BatchKeywords(TypedDict, total=False):
    """What changes from batch to batch."""

    token_mask: Tensor | None
    num_items: int | Tensor | None
    group: ProcessGroup | None


class StudentHeadKeywords(BatchKeywords, total=False):
    """The same, and the bias of the student's head."""

    student_bias: Tensor | None


class HeadsKeywords(StudentHeadKeywords, total=False):
    """The same, and the bias of the teacher's head."""

    teacher_bias: Tensor | None


class EntropyKLKeywords(DenseKeywords, BatchKeywords, total=False):
    """The options of `entropy_kl`."""


class TopkKLKeywords(StoredKeywords, BatchKeywords, total=False):
    """The options of `topk_kl`."""


class LinearEntropyKLKeywords(DenseKeywords, HeadsKeywords, total=False):
    """The options of `linear_entropy_kl`."""


class LinearTopkKLKeywords(StoredKeywords, StudentHeadKeywords, total=False):
    """The options of `linear_topk_kl`."""
