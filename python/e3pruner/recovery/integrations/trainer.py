"""Distillation inside `transformers.Trainer` and the trainers made of it, TRL's `SFTTrainer` among them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from e3pruner.recovery.integrations.step import DistillStep, batch_of
from e3pruner.recovery.options import DistillOptions
from e3pruner.recovery.teacher import Teacher


class DistillMixin:
    """Replaces the loss of a `Trainer` subclass by distillation: `class Mine(DistillMixin, SFTTrainer): ...`.

    `teacher`: a model or a `TeacherCache` (whose data must give each example its number as `rows`). `distill`: options
    of the loss. Learning rate, precision, clipping and all else are the trainer's. The mean is over all tokens of an
    optimizer step, whatever `gradient_accumulation_steps` and the number of processes.
    """

    loss_is_scaled_for_ga: bool | None = True

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | Teacher,
        distill: DistillOptions | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distill_step = DistillStep(self.accelerator.unwrap_model(self.model), teacher, distill)  # type: ignore[attr-defined]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, self._shown = self.distill_step.backward_loss(model, batch_of(inputs))
        if model.training:
            return loss
        self.distill_step.discard()
        return (self._shown, {}) if return_outputs else self._shown

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            self.distill_step.finish(model.parameters())
        return self._shown / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]


class DistillTrainer(DistillMixin, Trainer):
    """`transformers.Trainer` that distils."""
