"""Low-rank adapters that are trained in place of the weights and end inside them. Needs `peft`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel


@contextmanager
def merged_adapters(model: PreTrainedModel, rank: int, seed: int) -> Iterator[None]:
    """Inside the block every linear layer of `model` but its output head computes (W + 2·B·A)·x, with A (rank, in)
    drawn from `seed` and B (out, rank) zero at first (LoRA, arXiv 2106.09685, α = 2·rank); afterwards W holds the sum.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    mark = vars(model).pop("peft_config")  # by it others know a model that is not whole; this one will be
    try:
        yield
    finally:
        model.peft_config = mark
        adapted.merge_and_unload()
