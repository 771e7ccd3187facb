"""What rows of tokens need of a model: positions enough, and predictions that padding does not change."""

from __future__ import annotations

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from e3pruner.models.head import last_hidden, output_head
from e3pruner.models.stack import evaluating, speaker_of


def position_limit(model: PreTrainedModel) -> int | None:
    """The most tokens that a sequence of `model` may have by its configuration; None where that names no number.

    Rotary positions can be computed for any place, but behind this one the model has learnt nothing.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if limit is None or limit > 0 else None  # −1 says so too


@torch.no_grad()
def check_padding(name: str, model: PreTrainedModel) -> None:
    """Raises ValueError naming `name` unless padding beside a row changes no prediction of `model`."""
    vocabulary = output_head(model).weight.shape[0]
    ids = torch.arange(9, device=model.device)[None] % vocabulary
    mask = torch.ones_like(ids)
    speaker = speaker_of(model)
    with evaluating(speaker):
        alone = last_hidden(speaker, ids).float()
        for before, behind in ((3, 0), (0, 3)):
            wide, cover = (pad(each, (before, behind)) for each in (ids, mask))
            beside = last_hidden(speaker, wide, cover)[:, before : before + ids.shape[1]].float()
            if not (beside - alone).abs().max() <= 1e-2 * alone.abs().max():
                side = "left" if before else "right"
                raise ValueError(f"{name} ({model.config.model_type}) reads padding on the {side} of a row")
