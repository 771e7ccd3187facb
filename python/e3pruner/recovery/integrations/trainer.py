"""Distillation inside `transformers.Trainer` and the trainers made of it, TRL's `SFTTrainer` among them."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from e3pruner.recovery.integrations.step import DistillStep, batch_of
from e3pruner.recovery.options import DistillOptions
from e3pruner.recovery.teacher import Teacher


class DistillMixin:
    """Replaces the loss of a `Trainer` subclass by distillation: `class Mine(DistillMixin, SFTTrainer): ...`.

    `teacher`: a model or a `TeacherCache` (whose data must give each example its number as `rows`). `distill`: options
    of the loss. Learning rate, precision, clipping and all else are the trainer's. The mean is over all tokens of an
    optimizer step, whatever `gradient_accumulation_steps` and the number of processes. So is the loss that is logged;
    that of an evaluation is the mean over all its tokens.
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
        student, tokenizer = self.accelerator.unwrap_model(self.model), getattr(self, "processing_class", None)  # type: ignore[attr-defined]
        known = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
        self.distill_step = DistillStep(student, teacher, distill, known)
        self._evaluated = copy(self.distill_step)  # sums of its own

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if model.training:
            return self.distill_step.backward_loss(model, batch_of(inputs))[0]
        shown = self._evaluated.backward_loss(model, batch_of(inputs))[1]
        return (shown, {}) if return_outputs else shown

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """What the trainer adds up for its log: of the batches of a step the last one brings the mean of all."""
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            return self.distill_step.finish(model.parameters())
        return torch.zeros_like(loss)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The trainer's own, whose loss is a mean of its batches' means, with the mean over all tokens in its place."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        if (name := f"{metric_key_prefix}_loss") in output.metrics:
            output.metrics[name] = float(self._evaluated.mean())
        return output


class DistillTrainer(DistillMixin, Trainer):
    """`transformers.Trainer` that distils."""
