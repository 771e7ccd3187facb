"""One distillation step in somebody else's loop, where the model may be wrapped and a step may be many batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from e3kernels.profiling import named_range
from e3pruner.recovery.batches import IGNORED, Batch
from e3pruner.recovery.loss import DistillLoss
from e3pruner.recovery.options import DistillOptions
from e3pruner.recovery.teacher import LiveTeacher, Teacher


def batch_of(inputs: Mapping[str, Any]) -> Batch:
    """A `Batch` of what Hugging Face collators make: `input_ids` (B, S), and if given `labels` (B, S; −100 where none),
    `attention_mask` (B, S) and `rows` (B,), the sequences' numbers in the data of a `TeacherCache`. Padding predicts
    nothing, so the first token behind it is not learnt.

    Raises ValueError for sequences packed into one row, told apart by `position_ids`: they need another attention mask.
    """
    if "position_ids" in inputs:
        raise ValueError(
            "inputs hold position_ids: packed rows are not supported; set packing and padding_free to False"
        )
    labels, mask = inputs.get("labels", inputs["input_ids"])[:, 1:], inputs.get("attention_mask")
    if mask is not None:
        labels = labels.masked_fill(mask[:, :-1] == 0, IGNORED)
    return Batch(inputs["input_ids"], labels, inputs.get("rows"), mask)


class DistillStep:
    """Sums Σw·ℓ over the batches of a step; `finish` makes the gradient that of Σw·ℓ / Σw over all of them.

    The sum of the weights of a step is known only after its last batch: hence the division of the gradients, before
    anything clips them. With torch.distributed running, Σw goes over all ranks, for gradients that are *averaged* over
    them, as DDP and FSDP do.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel | Teacher, options: DistillOptions | None = None
    ) -> None:
        source = LiveTeacher(teacher) if isinstance(teacher, PreTrainedModel) else teacher
        # The caller's loop decides about autocast; the loss follows it.
        self.loss = DistillLoss(student, source, options or DistillOptions(), None)
        self._weight: Tensor | None = None

    def backward_loss(self, wrapper: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(Σw·ℓ to be differentiated, the mean of this batch to be shown), running the student as `wrapper`(…).

        DDP and FSDP act in the forward of their wrapper, so the hidden states are taken from within; of the logits
        that the model computes on the way only the last position is asked for.
        """
        base = self.loss.student.base_model
        outputs: list[Any] = []
        hook = base.register_forward_hook(lambda *call: outputs.append(call[-1]))
        try:
            with named_range("student forward"):
                wrapper(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1
                )
        finally:
            hook.remove()
        targets = self.loss.targets(batch)
        loss, stats = self.loss.of_hidden(outputs[0].last_hidden_state, batch, targets, "sum")
        weight = stats.weight.sum()
        self._weight = weight if self._weight is None else self._weight + weight
        return loss, loss.detach() / weight

    def discard(self) -> None:
        """Forget the batches since the last step: they were evaluated, not learnt from."""
        self._weight = None

    @torch.no_grad()
    def finish(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by Σw. Raises ValueError if no batch of the step had a token to learn from."""
        if self._weight is None or (weight := self._weight.clone()) == 0:
            raise ValueError("labels: no token of this step is to be predicted (all are −100)")
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(weight)
            weight /= dist.get_world_size()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(weight)
        self._weight = None
