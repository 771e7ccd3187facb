"""Random weights that hide nothing: what every small model of the tests has."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def randomised(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """`model` with weights that are large and differ everywhere, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                inputs = parameter[0].numel() if parameter.dim() == 4 else parameter.shape[-1]  # of a convolution
                gain = 1.0 if "embed" in name or "wte" in name else 1.5 * inputs**-0.5
                parameter.copy_(gain * noise)
            else:
                parameter.add_(0.3 * noise)
    if model.can_generate():
        model.generation_config.eos_token_id = None  # greedy generation runs to its full length
    return model
