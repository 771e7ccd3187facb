"""Prompts of a request: token ids and the padding on their left."""

from __future__ import annotations

import torch


def check_prompt(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Raises ValueError for ids that are not int64 (batch, at least 1) and for a mask of another shape."""
    if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.dtype != torch.long:
        raise ValueError(
            f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}; it must be int64 (batch, at least 1)"
        )
    check_mask_shape(attention_mask, input_ids)


def check_mask_shape(attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> None:
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; input_ids has {tuple(input_ids.shape)}"
        )


def padding(attention_mask: torch.Tensor, batch: int) -> list[int]:
    """Left padding of each of `batch` sequences, from a mask (batch, S) of zeros and ones.

    Raises ValueError for another shape, for other values and for zeros elsewhere than on the left.
    """
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; it must be ({batch}, tokens)")
    mask = attention_mask.cpu()
    others = mask[(mask != 0) & (mask != 1)]
    if others.numel():
        raise ValueError(f"attention_mask holds {others[0].item()}; it must hold 0 (padding) and 1")
    starts = (mask == 0).sum(-1)
    expected = torch.arange(mask.shape[-1]) >= starts[:, None]
    if not torch.equal(mask == 1, expected) or (starts == mask.shape[-1]).any():
        raise ValueError("attention_mask must be zeros (left padding) followed by at least one 1 in every row")
    return starts.tolist()
