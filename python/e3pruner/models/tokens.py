"""Token batches: what calibration and evaluation run on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def check_token_batches(name: str, batches: Iterable[Any], vocabulary: int) -> list[Tensor]:
    """`batches` as a list of (B, T) int64 tensors on the CPU; B may differ from batch to batch, T may not.

    A batch is an integer tensor or a nested list of integers. Raises `ValueError` naming `name` and the batch for no
    batches, an empty or ragged one, one that is not two-dimensional or holds no integers, T < 2, and tokens outside
    0 … vocabulary − 1.
    """
    checked = [_as_tensor(f"{name}[{index}]", batch) for index, batch in enumerate(batches)]
    if not checked:
        raise ValueError(f"{name} is empty; at least one batch of token ids is needed")
    length = checked[0].shape[1]
    for index, batch in enumerate(checked):
        if batch.shape[1] != length:
            raise ValueError(f"{name}[{index}] has {batch.shape[1]} tokens a sequence, {name}[0] has {length}")
        low, high = int(batch.min()), int(batch.max())
        if low < 0 or high >= vocabulary:
            token = low if low < 0 else high
            raise ValueError(f"{name}[{index}] holds token {token}; the vocabulary is 0 to {vocabulary - 1}")
    return checked


def _as_tensor(name: str, batch: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(batch)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} is no rectangular batch of token ids (sequences, tokens): {error}") from error
    if tensor.dim() != 2 or tensor.numel() == 0 or tensor.shape[1] < 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected (sequences ≥ 1, tokens ≥ 2)")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {tensor.dtype}; token ids are integers")
    return tensor.detach().to("cpu", torch.int64)
