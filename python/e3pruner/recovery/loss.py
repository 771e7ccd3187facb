"""The distillation loss of a student model, for any training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from e3kernels.profiling import named_range
from e3pruner.evaluation.figures import Figures
from e3pruner.models import OutputHead, last_hidden, output_head
from e3pruner.models.streaming import check_resident
from e3pruner.models.vocabulary import common_vocabulary
from e3pruner.recovery.options import DistillOptions
from e3pruner.recovery.teacher import Teacher
from e3pruner.text.batches import Batch, in_order
from e3pruner.text.sequences import IGNORED, Rows


@dataclass
class DistillLoss:
    """Loss of `student` against `teacher` on a batch, under autocast to `dtype` (None: none).

    `tokenizer_size`: of the tokenizer that both share, where it is known: see `DistillOptions.vocabulary`.
    """

    student: PreTrainedModel
    teacher: Teacher
    options: DistillOptions
    dtype: torch.dtype | None
    tokenizer_size: int | None = None

    def __post_init__(self) -> None:
        check_resident("student", self.student, "to train it, load it with")
        sizes = {"teacher": self.teacher.vocabulary, "student": output_head(self.student).weight.shape[0]}
        known = self.teacher.tokenizer_size if self.tokenizer_size is None else self.tokenizer_size
        self.vocabulary = common_vocabulary(sizes, self.options.vocabulary, known, joint=" and the ")
        if self.vocabulary != self.teacher.vocabulary:
            self.teacher.narrow(self.vocabulary)

    def targets(self, batch: Batch) -> Any:
        with self.autocast(), named_range("teacher forward"):
            return self.teacher.targets(batch)

    def __call__(self, batch: Batch, targets: Any, reduction: str = "mean") -> tuple[Tensor, Any]:
        """(loss, per-token statistics), as `e3kernels.linear_entropy_kl` gives them for positions 0 … S − 2."""
        with self.autocast():
            with named_range("student forward"):
                hidden = self.student_hidden(batch)
            return self.of_hidden(hidden, output_head(self.student), batch, targets, reduction)

    def of_hidden(
        self, hidden: Tensor, head: OutputHead, batch: Batch, targets: Any, reduction: str
    ) -> tuple[Tensor, Any]:
        """The same from the student's last hidden states (B, S, H) and head, for a loop that runs the model itself."""
        options = self.options
        if hasattr(head.weight, "device_mesh") and not torch.is_autocast_enabled(hidden.device.type):
            head = head.to(hidden.dtype)  # as FSDP does, whose mixed precision stores another dtype than it multiplies
        with named_range("loss"):
            result: tuple[Tensor, Any] = self.teacher.loss(
                hidden[:, :-1],
                head.narrowed(self.vocabulary),
                targets,
                batch.labels,
                temperature=options.temperature,
                weighting=options.weighting,
                gamma=options.gamma,
                kd_ratio=options.kd_ratio,
                divergence=options.divergence,
                ignore_index=IGNORED,
                reduction=reduction,
                return_stats=True,
            )
        return result

    def student_hidden(self, batch: Batch) -> Tensor:
        """The student's last hidden states (B, S, H)."""
        return last_hidden(self.student, **batch.inputs)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.student.device.type, self.dtype, enabled=self.dtype is not None)


class HeldOut:
    """Held-out text on which the student of `loss` is watched; a live teacher runs over it once only."""

    def __init__(self, loss: DistillLoss, data: Rows, batch_size: int) -> None:
        self.loss = loss
        self.batches = [batch.to(loss.student.device) for batch in in_order(data, batch_size)]
        self.targets: list[Any] = [None if loss.teacher.head is None else loss.targets(batch) for batch in self.batches]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """What `e3pruner.evaluate` measures, under the loss's autocast, whatever the loss trains on: "perplexity", and
        beside a live teacher "kl" in nats per token and "top1_agreement"."""
        figures, loss = Figures(), self.loss
        student = self._ready(output_head(loss.student))
        teacher = None if loss.teacher.head is None else self._ready(loss.teacher.head)
        with loss.autocast():
            for batch, targets in zip(self.batches, self.targets, strict=True):
                valid = batch.labels != IGNORED
                hidden = loss.student_hidden(batch)[:, :-1][valid]
                beside = None if teacher is None else (teacher, targets[valid])
                figures.add(student, hidden, batch.labels[valid], beside)
        return figures.means()

    def _ready(self, head: OutputHead) -> OutputHead:
        """`head` with the columns that count, cast once to what autocast would cast it to for every tile."""
        narrow = head.narrowed(self.loss.vocabulary)
        return narrow if self.loss.dtype is None else narrow.to(self.loss.dtype)
