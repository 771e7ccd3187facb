"""One distillation step in somebody else's loop, where the model may be wrapped and a step may be many batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from e3kernels.profiling import named_range
from e3pruner.models import output_head
from e3pruner.models.head import (
    check_packing,
    check_per_token,
    in_dtype_of,
    only_hidden,
    position_arguments,
    without_head,
)
from e3pruner.models.inputs import extras_for
from e3pruner.models.stack import returning_dicts
from e3pruner.models.vocabulary import tokenizer_size
from e3pruner.recovery.loss import DistillLoss
from e3pruner.recovery.options import DistillOptions
from e3pruner.recovery.teacher import LiveTeacher, Teacher
from e3pruner.text.batches import Batch
from e3pruner.text.given import without_placeholders
from e3pruner.text.sequences import IGNORED, beside_padding, check_mask


def batch_of(inputs: Mapping[str, Any]) -> Batch:
    """A `Batch` of what Hugging Face collators make: `input_ids` (B, S), and if given `labels` (B, S; −100 where none),
    `attention_mask` (B, S), `rows` (B,), the sequences' numbers in the data of a `TeacherCache`, and `pixel_values` and
    what else of tensors the models take. Padding predicts
    nothing and is not predicted, so the first token behind it is not learnt; and with `position_ids` (B, S) of
    documents packed into a row, no document's first token is.

    Raises ValueError for an `attention_mask` that holds anything but 0 and 1, and for `position_ids` of another shape,
    or beside padding: the models tell documents apart by positions only where nothing is masked.
    """
    input_ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
    labels = inputs.get("labels", input_ids)[:, 1:]
    if mask is not None:
        check_mask("attention_mask", mask)
        mask = None if mask.all() else mask  # and nothing counts positions by it
    if positions is not None:
        if positions.shape != input_ids.shape:
            found, wanted = tuple(positions.shape), tuple(input_ids.shape)
            raise ValueError(f"position_ids has shape {found}; input_ids ask for {wanted}")
        if mask is not None:
            raise ValueError("attention_mask holds padding beside position_ids; pack without padding, or leave one out")
        labels = labels.masked_fill(positions[:, 1:] == 0, IGNORED)
    if mask is not None:
        labels = labels.masked_fill(beside_padding(mask), IGNORED)
    extras = {name: value for name, value in inputs.items() if name not in Batch._fields and isinstance(value, Tensor)}
    return Batch(input_ids, labels, inputs.get("rows"), mask, positions, extras or None)


class DistillStep:
    """Sums Σw·ℓ over the batches of a step; `finish` makes the gradient that of Σw·ℓ / Σw over all of them.

    The sum of the weights of a step is known only after its last batch: hence the division of the gradients, before
    anything clips them. With torch.distributed running, Σw goes over all ranks, for gradients that are *averaged* over
    them, as DDP and FSDP do. `tokenizer`, which both models share, proves what of vocabularies of different sizes is
    padding; see `DistillOptions.vocabulary`.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | Teacher,
        options: DistillOptions | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        source = LiveTeacher(teacher) if isinstance(teacher, PreTrainedModel) else teacher
        # The caller's loop decides about autocast; the loss follows it.
        self.loss = DistillLoss(student, source, options or DistillOptions(), None, tokenizer_size(tokenizer))
        self._sums: Tensor | None = None  # Σw·ℓ and Σw of the batches since the last step
        self._packs = False

    def backward_loss(self, wrapper: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(Σw·ℓ to be differentiated, the mean of this batch to be shown), running the student as `wrapper`(…).

        The mean of a batch without a token to predict is 0; what a step minimises is what `finish` gives.

        Raises ValueError at the first packed batch if student or teacher does not keep its documents apart.
        """
        if batch.position_ids is not None and not self._packs:
            check_packing("student", self.loss.student, lambda _, *inputs: self._hidden(wrapper, *inputs))
            if isinstance(self.loss.teacher, LiveTeacher):
                check_packing("teacher", self.loss.teacher.model)
            self._packs = True
        batch = self._read(batch)
        before = output_head(self.loss.student)
        with named_range("student forward"):
            hidden = self._hidden(wrapper, batch.input_ids, batch.attention_mask, batch.position_ids, batch.extras)
        head = output_head(self.loss.student)
        # FSDP leaves its gathered weights, whose gradient it takes, or shards: those of the parameters themselves, or
        # of copies over fewer ranks, whose gradient nobody takes.
        head = before if hasattr(head.weight, "device_mesh") else head
        targets = self.loss.targets(batch)
        loss, stats = self.loss.of_hidden(hidden, head, batch, targets, "sum")
        weight = stats.weight.sum()
        sums = torch.stack([loss.detach().to(weight.dtype), weight])
        shown = _mean(sums)
        self._sums = sums if self._sums is None else self._sums + sums
        return loss, shown

    def _read(self, batch: Batch) -> Batch:
        """`batch` with what student and teacher take of its extras; what stands for these is not to be predicted."""
        if batch.extras is None:
            return batch
        models = {"student": self.loss.student}
        if isinstance(self.loss.teacher, LiveTeacher):
            models["teacher"] = self.loss.teacher.model
        extras = extras_for("the batch", batch.extras, models)
        if not extras:
            return batch._replace(extras=None)
        if batch.position_ids is not None:
            raise ValueError(f"position_ids of packed documents stand beside {', '.join(extras)}; give each a row")
        text = without_placeholders(batch.labels, batch.input_ids[:, 1:], models)
        return batch._replace(extras=extras, labels=text)

    def _hidden(
        self,
        wrapper: nn.Module,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The student's last hidden states (B, S, H), running it as `wrapper`(…).

        DDP and FSDP act in the forward of their wrapper, so they are taken from within, where the output head receives
        them; it multiplies nothing on the way. The wrapper must see them among its outputs too: FSDP brings back the
        weights it has freed when the gradient of an output arrives.
        """
        student = self.loss.student
        beside = in_dtype_of(student, extras or {})
        where = position_arguments(student, mask, positions, beside=bool(beside))
        with ExitStack() as stack:
            stack.enter_context(returning_dicts(student))
            received = stack.enter_context(without_head(student))

            def show(module: nn.Module, inputs: Any, output: Any) -> None:
                output["hidden_states"] = (only_hidden(student, received),)

            stack.callback(student.register_forward_hook(show, prepend=True).remove)  # before FSDP's own
            wrapper(input_ids=ids, attention_mask=mask, use_cache=False, **where, **beside)
        hidden = only_hidden(student, received)
        if beside:
            check_per_token(student, hidden, ids)
        return hidden

    @torch.no_grad()
    def mean(self) -> Tensor:
        """Σw·ℓ / Σw over the batches since the last step, of all ranks; 0 without a token to predict. Forgets them."""
        return _mean(self._reduced())

    @torch.no_grad()
    def finish(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Divide the gradients by Σw. Returns the step's Σw·ℓ / Σw.

        Raises ValueError, on all ranks alike, if no batch of the step had a token to learn from.
        """
        sums = self._reduced()
        if sums[1] == 0:
            raise ValueError("labels: no token of this step is to be predicted (all are −100)")
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(sums[1])
        return _mean(sums)

    def _reduced(self) -> Tensor:
        """Σw·ℓ and Σw since the last step, each the mean over all ranks."""
        sums, self._sums = self._sums, None
        if sums is None:
            sums = torch.zeros(2, device=self.loss.student.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
            sums /= dist.get_world_size()
        return sums


def _mean(sums: Tensor) -> Tensor:
    """Σw·ℓ / Σw; 0 where both are."""
    return sums[0] / sums[1].clamp(min=torch.finfo(sums.dtype).tiny)
