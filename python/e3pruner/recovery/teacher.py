"""What a student learns from: something that knows its own predictions for a batch, and the loss against them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

import e3kernels as e3k
from e3pruner.models import OutputHead, last_hidden, output_head
from e3pruner.recovery.batches import Batch
from e3pruner.storage import fingerprint


class Teacher(Protocol):
    """`vocabulary`: columns of its predictions. `any_text`: whether it has predictions for text other than the training
    data. `identity`: a hash by which a resume knows that it is the same one.
    """

    vocabulary: int
    any_text: bool

    @property
    def identity(self) -> str: ...

    def check(self, data: Tensor, temperature: float) -> None:
        """Raises ValueError if it cannot teach `data` (N, S) at `temperature`."""

    def targets(self, batch: Batch) -> Any:
        """Its predictions for `batch`, in the form that `loss` takes; no gradient."""

    def loss(self, hidden: Tensor, head: OutputHead, targets: Any, labels: Tensor, **options: Any) -> Any:
        """The loss of a student's `hidden` (B, S − 1, H) under `head` against `targets`; `labels` (B, S − 1).

        `options` are those of the `e3kernels` loss, whose result this is.
        """


class LiveTeacher:
    """A model in memory: its targets are hidden states, and no logits are ever materialised."""

    any_text = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.head = output_head(model)
        self.vocabulary = self.head.weight.shape[0]

    @property
    def identity(self) -> str:
        # The output head stands for the weights: hashing all of a large teacher would take minutes.
        return fingerprint(self.model.config.to_dict(), self.head.weight)

    def check(self, data: Tensor, temperature: float) -> None:
        """A model can teach any text."""

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        return last_hidden(self.model, batch.input_ids, batch.attention_mask)[:, :-1]

    def loss(self, hidden: Tensor, head: OutputHead, targets: Tensor, labels: Tensor, **options: Any) -> Any:
        return e3k.linear_entropy_kl(
            hidden,
            head.weight,
            targets,
            self.head.weight,
            labels,
            student_bias=head.bias,
            teacher_bias=self.head.bias,
            student_softcap=head.softcap,
            teacher_softcap=self.head.softcap,
            student_scale=head.scale,
            teacher_scale=self.head.scale,
            **options,
        )
