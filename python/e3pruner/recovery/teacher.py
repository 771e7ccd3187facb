"""What a student learns from: something that knows its own predictions for a batch, and the loss against them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import e3kernels as e3k
from e3pruner.models import OutputHead, last_hidden, output_head
from e3pruner.models.identity import model_identity
from e3pruner.models.stack import evaluating
from e3pruner.models.streaming import stream_of
from e3pruner.precision import weights_in
from e3pruner.storage import fingerprint
from e3pruner.text.batches import Batch
from e3pruner.text.given import check_rows
from e3pruner.text.sequences import Sequences


class Teacher(Protocol):
    """`vocabulary`: columns of its predictions. `tokenizer_size`: of its tokenizer, where it is known. `head`: the
    output head whose hidden states its `targets` are; None if it has predictions for the training data alone.
    `identity`: a hash by which a resume knows that it is the same one.
    """

    vocabulary: int
    tokenizer_size: int | None

    @property
    def head(self) -> OutputHead | None: ...

    @property
    def identity(self) -> str: ...

    def narrow(self, vocabulary: int) -> None:
        """From now on, predict the first `vocabulary` tokens only. Raises ValueError if it cannot."""

    def check(self, data: Sequences, temperature: float) -> None:
        """Raises ValueError if it cannot teach `data` at `temperature`."""

    def targets(self, batch: Batch) -> Any:
        """Its predictions for `batch`, in the form that `loss` takes; no gradient."""

    def loss(self, hidden: Tensor, head: OutputHead, targets: Any, labels: Tensor, **options: Any) -> Any:
        """The loss of a student's `hidden` (B, S − 1, H) under `head` against `targets`; `labels` (B, S − 1).

        `options` are those of the `e3kernels` loss, whose result this is.
        """


def narrowed(model: PreTrainedModel, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Inside the block the linear layers of `model` hold their weights in `dtype`: the casts that autocast to `dtype`
    would repeat at every use, done once. Embeddings and the output head stay; so do weights shared with them, and
    streamed layers, which are not all to be in memory.
    """
    kept = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    if (streamed := stream_of(model)) is not None:
        kept |= {id(p) for p in streamed.layers.parameters()}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) not in kept]
    return weights_in((p for m in linears for p in m.parameters()), dtype)


class LiveTeacher:
    """A model in memory: its targets are hidden states, and no logits are ever materialised.

    It is in evaluation mode while it teaches; the caller's mode of every module is back afterwards.
    `dtype`: that of the autocast it will run under, if known; its output head is then cast once only.
    """

    tokenizer_size: int | None = None

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        self.model = model
        head = output_head(model)
        self.head = head if dtype is None else replace(head, weight=head.weight.detach().to(dtype))
        self.vocabulary = head.weight.shape[0]

    @property
    def identity(self) -> str:
        return model_identity(self.model)

    def narrow(self, vocabulary: int) -> None:
        """Cut its head, without a copy."""
        self.head, self.vocabulary = self.head.narrowed(vocabulary), vocabulary

    def check(self, data: Sequences, temperature: float) -> None:
        """A model can teach any text that it can run on."""
        check_rows("data", [data], teacher=self.model)

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        with evaluating(self.model):
            return last_hidden(self.model, **batch.inputs)[:, :-1]

    def loss(self, hidden: Tensor, head: OutputHead, targets: Tensor, labels: Tensor, **options: Any) -> Any:
        both = head.arguments("student") | self.head.arguments("teacher")
        return e3k.linear_entropy_kl(student_hidden=hidden, teacher_hidden=targets, labels=labels, **both, **options)


class RememberingTeacher(LiveTeacher):
    """A `LiveTeacher` of many students that learn from the same text: it runs once over each batch, and keeps its last
    hidden states on the CPU.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        super().__init__(model, dtype)
        self._kept: dict[str, Tensor] = {}

    def targets(self, batch: Batch) -> Tensor:
        """What the model predicts for `batch`, whoever asked first."""
        inputs = {"input_ids": batch.input_ids, "mask": batch.attention_mask, "positions": batch.position_ids}
        key = fingerprint({name: each for name, each in inputs.items() if each is not None})
        if key not in self._kept:
            self._kept[key] = super().targets(batch).cpu()
        return self._kept[key].to(batch.input_ids.device)
