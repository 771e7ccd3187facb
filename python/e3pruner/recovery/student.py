"""The parameters that training changes, and the state a model is in while it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from e3pruner.models import find_layers
from e3pruner.models.stack import evaluating


def refuse_shared_weights(student: nn.Module, teacher: nn.Module) -> None:
    """Raises ValueError if training `student` would train `teacher` too."""
    owned = {p.data_ptr() for p in teacher.parameters()}
    for name, parameter in student.named_parameters():
        if parameter.data_ptr() in owned:
            raise ValueError(f"teacher shares the weight {name} with the student; give it a copy of its own")


@contextmanager
def trained_parameters(model: PreTrainedModel, trainable: str) -> Iterator[dict[str, nn.Parameter]]:
    """Yields the parameters to train, by name, as fp32 master weights; the others need no gradient meanwhile.

    `trainable`: "all", or "decoder" for the decoder layers only. Inside, `model` is in evaluation mode: without
    dropout it has one function to fit, and a step depends on nothing but weights and data. Afterwards mode, dtypes
    and `requires_grad` are as before.
    """
    before = {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    chosen = {id(p) for p in (model if trainable == "all" else find_layers(model)).parameters()}
    parameters: dict[str, nn.Parameter] = {}
    for name, p in model.named_parameters():
        p.requires_grad_(id(p) in chosen)
        if p.requires_grad:
            p.data = p.data.to(torch.float32)
            parameters[name] = p
    try:
        with evaluating(model):
            yield parameters
    finally:
        for name, p in model.named_parameters():
            p.grad = None
            p.requires_grad_(before[name][0])
            p.data = p.data.to(before[name][1])
