"""What rows of tokens need of a model: positions enough, and predictions that padding does not change."""

from __future__ import annotations

from itertools import chain

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from e3pruner.models.head import last_hidden, output_head
from e3pruner.models.stack import evaluating

# What transformers calls tables of positions, learnt or computed once for a fixed length.
_TABLES = ("wpe", "embed_positions", "position_embed", "positions_embed", "pos_e")


def position_limit(model: PreTrainedModel) -> int | None:
    """The most tokens that a sequence of `model` may have, where it looks its positions up in a table; else None.

    Rotary positions and ALiBi can be computed for any place, however far behind what the model was trained on.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tables = (name.lower() for name, _ in chain(model.named_parameters(), model.named_buffers()))
    return limit if any(each in name for name in tables for each in _TABLES) else None


@torch.no_grad()
def check_padding(name: str, model: PreTrainedModel) -> None:
    """Raises ValueError naming `name` unless padding beside a row changes no prediction of `model`."""
    vocabulary = output_head(model).weight.shape[0]
    ids = torch.arange(9, device=model.device)[None] % vocabulary
    mask = torch.ones_like(ids)
    with evaluating(model):
        alone = last_hidden(model, ids).float()
        for before, behind in ((3, 0), (0, 3)):
            wide, cover = (pad(each, (before, behind)) for each in (ids, mask))
            beside = last_hidden(model, wide, cover)[:, before : before + ids.shape[1]].float()
            if not (beside - alone).abs().max() <= 1e-2 * alone.abs().max():
                side = "left" if before else "right"
                raise ValueError(f"{name} ({model.config.model_type}) reads padding on the {side} of a row")
