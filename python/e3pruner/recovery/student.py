"""The parameters that training changes, and the state a model is in while it does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from e3pruner.models import find_layers
from e3pruner.models.stack import evaluating
from e3pruner.recovery.options import DistillOptions
from e3pruner.requirements import require
from e3pruner.surgery import PruningPlan


def refuse_shared_weights(student: nn.Module, teacher: nn.Module) -> None:
    """Raises ValueError if training `student` would train `teacher` too."""
    owned = {p.data_ptr() for p in teacher.parameters()}
    for name, parameter in student.named_parameters():
        if parameter.data_ptr() in owned:
            raise ValueError(f"teacher shares the weight {name} with the student; give it a copy of its own")


def beside_cuts(plan: PruningPlan) -> list[int]:
    """The layers of the pruned model, by their index there, that lost a neighbour."""
    dense = [-1, *plan.kept, plan.num_layers]
    return [i for i in range(len(plan.kept)) if dense[i + 2] - dense[i] != 2]


def _chosen(model: PreTrainedModel, trainable: str, plan: PruningPlan | None) -> list[nn.Parameter]:
    """What `trainable` names, but for what the caller froze: of that nothing is trained, nor are adapters beside it."""
    if trainable == "lora":
        layers = [(m, getattr(m, "base_layer", None)) for m in model.modules()]
        adapted = [m for m, base in layers if base is not None and base.weight.requires_grad]
        return [p for m in adapted for name, p in m.named_parameters() if name.startswith("lora_")]
    if trainable == "norms":
        named: Iterable[nn.Parameter] = [p for p in model.parameters() if p.dim() <= 1]
    elif trainable == "decoder":
        named = find_layers(model).parameters()
    elif trainable == "all":
        named = model.parameters()
    else:
        stack = find_layers(model)
        if plan is None or len(plan.kept) != len(stack):
            kept = "None" if plan is None else f"of {len(plan.kept)} kept layers"
            raise ValueError(
                f"plan is {kept}; trainable='cuts' needs the one by which the {len(stack)} layers were kept"
            )
        named = [p for i in beside_cuts(plan) for p in stack[i].parameters()]
    return [p for p in named if p.requires_grad]


@contextmanager
def trained_parameters(
    model: PreTrainedModel, options: DistillOptions, plan: PruningPlan | None, dtype: torch.dtype | None
) -> Iterator[dict[str, nn.Parameter]]:
    """Yields the parameters to train, by name, as fp32 master weights; the others need no gradient meanwhile.

    Inside, `model` is in evaluation mode: without dropout it has one function to fit, and a step depends on nothing but
    weights and data. Without autocast (`dtype` None) the frozen weights are fp32 too. Afterwards LoRA's matrices are
    merged into the weights that they adapt; mode, dtypes and `requires_grad` are as before.

    What the caller froze (requires_grad=False) stays frozen. Raises ValueError if nothing is left to train.
    """
    before = [(p, p.requires_grad, p.dtype) for p in model.parameters()]
    adapters: AbstractContextManager[None] = nullcontext()
    if options.trainable == "lora":
        require("peft")
        from e3pruner.recovery.lora import merged_adapters

        adapters = merged_adapters(model, options.lora_rank, options.seed)
    try:
        with adapters, evaluating(model):
            for p, requires_grad, _ in before:
                p.requires_grad_(requires_grad)  # peft freezes all that it adapts
            chosen = {id(p) for p in _chosen(model, options.trainable, plan)}
            if not chosen:
                raise ValueError(
                    f"trainable={options.trainable!r} names no parameter that requires a gradient, and what is frozen "
                    "stays frozen; call requires_grad_() on what is to be trained"
                )
            for p in model.parameters():
                p.requires_grad_(id(p) in chosen)
                if p.requires_grad or dtype is None:
                    p.data = p.data.to(torch.float32)
            yield {name: p for name, p in model.named_parameters() if p.requires_grad}
    finally:
        for p, requires_grad, own in before:
            p.grad = None
            p.requires_grad_(requires_grad)
            p.data = p.data.to(own)
