"""One distillation step in somebody else's loop, where the model may be wrapped and a step may be many batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from e3kernels.profiling import named_range
from e3pruner.models.head import check_packing, decoder_of, position_arguments
from e3pruner.recovery.loss import DistillLoss
from e3pruner.recovery.options import DistillOptions
from e3pruner.recovery.teacher import LiveTeacher, Teacher
from e3pruner.text.batches import IGNORED, Batch


def batch_of(inputs: Mapping[str, Any]) -> Batch:
    """A `Batch` of what Hugging Face collators make: `input_ids` (B, S), and if given `labels` (B, S; −100 where none),
    `attention_mask` (B, S) and `rows` (B,), the sequences' numbers in the data of a `TeacherCache`. Padding predicts
    nothing, so the first token behind it is not learnt; and with `position_ids` (B, S) of documents packed into a row,
    no document's first token is.

    Raises ValueError for `position_ids` of another shape, or beside padding: the models tell documents apart by
    positions only where nothing is masked.
    """
    input_ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
    labels = inputs.get("labels", input_ids)[:, 1:]
    if positions is not None:
        if positions.shape != input_ids.shape:
            found, wanted = tuple(positions.shape), tuple(input_ids.shape)
            raise ValueError(f"position_ids has shape {found}; input_ids ask for {wanted}")
        if mask is not None and not mask.all():
            raise ValueError("attention_mask holds padding beside position_ids; pack without padding, or leave one out")
        mask, labels = None, labels.masked_fill(positions[:, 1:] == 0, IGNORED)
    if mask is not None:
        labels = labels.masked_fill(mask[:, :-1] == 0, IGNORED)
    return Batch(input_ids, labels, inputs.get("rows"), mask, positions)


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
        self._packs = False

    def backward_loss(self, wrapper: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(Σw·ℓ to be differentiated, the mean of this batch to be shown), running the student as `wrapper`(…).

        Raises ValueError at the first packed batch if student or teacher does not keep its documents apart.
        """
        if batch.position_ids is not None and not self._packs:
            check_packing("student", self.loss.student, lambda _, *inputs: self._hidden(wrapper, *inputs))
            if isinstance(self.loss.teacher, LiveTeacher):
                check_packing("teacher", self.loss.teacher.model)
            self._packs = True
        with named_range("student forward"):
            hidden = self._hidden(wrapper, batch.input_ids, batch.attention_mask, batch.position_ids)
        targets = self.loss.targets(batch)
        loss, stats = self.loss.of_hidden(hidden, batch, targets, "sum")
        weight = stats.weight.sum()
        self._weight = weight if self._weight is None else self._weight + weight
        return loss, loss.detach() / weight

    def _hidden(self, wrapper: nn.Module, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """The student's last hidden states (B, S, H), running it as `wrapper`(…).

        DDP and FSDP act in the forward of their wrapper, so they are taken from within; of the logits that the model
        computes on the way only the last position is asked for.
        """
        outputs: list[Any] = []
        where = position_arguments(self.loss.student, mask, positions)
        hook = decoder_of(self.loss.student).register_forward_hook(lambda *call: outputs.append(call[-1]))
        try:
            wrapper(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1, **where)
        finally:
            hook.remove()
        return outputs[0].last_hidden_state

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
