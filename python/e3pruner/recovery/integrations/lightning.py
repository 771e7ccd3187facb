"""Distillation as a `LightningModule`."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.recovery.integrations.step import DistillStep, batch_of
from e3pruner.recovery.options import DistillOptions
from e3pruner.recovery.teacher import Teacher


class DistillMixin(LightningModule):
    """Gives a `LightningModule` the distillation of `student` from `teacher`; `configure_optimizers` is the user's.

    Batches are dicts with `input_ids` and, if wanted, `labels`, `attention_mask` and `rows`, as in `batch_of`. Clipping
    and accumulation of the `lightning.Trainer` see the mean over all tokens of an optimizer step, and log it as "loss".
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | Teacher,
        distill: DistillOptions | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        # In a tuple, so that a teacher's weights are neither trained nor saved with the student's.
        self._step = (DistillStep(student, teacher, distill, tokenizer),)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        loss, _ = self._step[0].backward_loss(self.student, batch_of(batch))
        # Lightning divides by the number of accumulated batches; the mean over their tokens is taken in one go instead.
        return loss * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.log("loss", self._step[0].finish(self.student.parameters()), prog_bar=True)
