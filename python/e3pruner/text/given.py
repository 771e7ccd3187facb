"""Token batches as a user has them, checked and made `Sequences`: one tensor, lists, dicts, BatchEncodings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from e3pruner.models.head import check_packing
from e3pruner.models.inputs import extras_for, placeholders
from e3pruner.models.positions import check_padding, position_limit
from e3pruner.text.extras import Extras
from e3pruner.text.sequences import IGNORED, Sequences, check_mask, joined

Given = Tensor | Sequences | Mapping[str, Any] | Iterable[Any]
"""What `batches_of` takes."""


def batches_of(name: str, given: Given, vocabulary: int, **models: PreTrainedModel) -> list[Sequences]:
    """The batches of `given`, on the CPU: one, or one for each entry of a list of them.

    A batch is token ids (B, T), a tensor or nested list of integers below `vocabulary`; a mapping as tokenizers and
    collators make it, with `input_ids` and where wanted `attention_mask`, `labels` (B, T; −100 where nothing is to be
    predicted) and `position_ids` of packed documents, all (B, T), and what else the models take, such as the
    `pixel_values` of images, its other keys being ignored; a tuple (`input_ids`, `attention_mask`); or `Sequences`.
    `models`, by the names of the arguments, are those that run on it. Tokens that stand for parts of an image, a video
    or a sound are not to be predicted, whatever `labels` say.

    Raises ValueError naming `name` and the batch for no batches, an empty or ragged one, one that is not
    two-dimensional or holds no integers, T < 2, batches of different T without an attention mask, tokens out of range,
    a mask that holds anything but 0 and 1, rows with nothing to predict, images that the models do not take or that
    cannot be told apart by row, and what `check_rows` refuses.
    """
    entries: Any = given
    listed = [entries] if is_whole(given) else list(entries)
    if not listed:
        raise ValueError(f"{name} is empty; at least one batch of token ids is needed")
    names = [f"{name}[{index}]" for index in range(len(listed))]
    _refuse_mask_as_batch(names, listed)
    batches = [_batch(*each, models) for each in zip(names, listed, strict=True)]
    masked = [_has_mask(entry) for entry in listed]
    for own, batch, entry, own_mask in zip(names, batches, listed, masked, strict=True):
        _check_tokens(own, batch, vocabulary)
        if batch.shape[1] != batches[0].shape[1] and not all(masked):
            raise ValueError(
                f"{own} has {batch.shape[1]} tokens per sequence, {names[0]} has {batches[0].shape[1]}; rows of "
                "different length need an attention_mask with every batch"
            )
        if not isinstance(entry, Sequences) and not own_mask:
            _refuse_unmasked_padding(own, batch, models)
    check_rows(name, batches, **models)
    return batches


def sequences_of(name: str, given: Given, vocabulary: int, **models: PreTrainedModel) -> Sequences:
    """All batches of `given` as one, narrower ones padded on the right; see `batches_of`."""
    return joined(batches_of(name, given, vocabulary, **models))


def is_whole(given: Given) -> bool:
    """Whether `given` is one batch rather than a list of them."""
    return isinstance(given, Sequences | Mapping) or (isinstance(given, Tensor | np.ndarray) and given.ndim != 3)


def without_placeholders(labels: Tensor, ids: Tensor, models: Mapping[str, PreTrainedModel]) -> Tensor:
    """`labels` like `ids`, with nothing to predict where `ids` stand for parts of an image or a sound."""
    tokens = sorted({token for each in models.values() for token in placeholders(each)})
    return labels.masked_fill(torch.isin(ids, torch.tensor(tokens, device=ids.device)), IGNORED)


def check_rows(name: str, batches: list[Sequences], **models: PreTrainedModel) -> None:
    """Raises ValueError naming `name` or the model unless every one of `models` can run on `batches`, apart or joined:
    it has positions enough, its images where it cannot do without, keeps packed documents apart, and does not read
    padding.
    """
    longest = max(map(_positions, batches))
    for role, model in models.items():
        limit = position_limit(model)
        if limit is not None and longest > limit:
            raise ValueError(
                f"{name} has sequences of {longest} tokens; {role} ({model.config.model_type}) has {limit} positions "
                f"(max_position_embeddings)"
            )
    for role, model in models.items():
        needed = model.main_input_name
        if needed != "input_ids" and any(b.extras is None or needed not in b.extras.inputs for b in batches):
            raise ValueError(f"{name} holds no {needed}, which {role} ({model.config.model_type}) cannot do without")
    packed = any(batch.position_ids is not None for batch in batches)
    padded = any(batch.attention_mask is not None or batch.shape[1] != batches[0].shape[1] for batch in batches)
    for role, model in models.items():
        if packed:
            check_packing(role, model)
        if padded:
            check_padding(role, model)


def _positions(rows: Sequences) -> int:
    if rows.position_ids is not None:
        return int(rows.position_ids.max()) + 1
    return rows.shape[1] if rows.attention_mask is None else int(rows.attention_mask.sum(-1).max())


def _has_mask(entry: Any) -> bool:
    if isinstance(entry, Sequences):
        return entry.attention_mask is not None
    return "attention_mask" in entry if isinstance(entry, Mapping) else _is_pair(entry)


def _is_pair(entry: Any) -> bool:
    """Whether it is (`input_ids`, `attention_mask`), and not two rows of token ids."""
    return isinstance(entry, tuple) and len(entry) == 2 and all(np.ndim(each) == 2 for each in entry)


def _batch(name: str, entry: Any, models: Mapping[str, PreTrainedModel]) -> Sequences:
    if isinstance(entry, Sequences):
        return entry.to(torch.device("cpu"))
    if _is_pair(entry):
        entry = dict(zip(("input_ids", "attention_mask"), entry, strict=True))
    elif not isinstance(entry, Mapping):
        entry = {"input_ids": entry}
    if "input_ids" not in entry:
        raise ValueError(f"{name} is a mapping without input_ids; it holds {', '.join(map(str, entry)) or 'nothing'}")
    ids = _integers(name, entry["input_ids"])
    if ids.dim() != 2 or ids.numel() == 0 or ids.shape[1] < 2:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; expected (sequences ≥ 1, tokens ≥ 2)")
    mask = _mask(name, entry.get("attention_mask"), ids)
    labels, positions = (
        None if entry.get(key) is None else _like(f"{name}: {key}", _integers(f"{name}: {key}", entry[key]), ids)
        for key in ("labels", "position_ids")
    )
    if mask is not None:
        ids = ids.masked_fill(mask == 0, 0)  # what stands there may be no token at all
    held = extras_for(name, entry, models)
    if held:
        labels = without_placeholders(ids if labels is None else labels, ids, models)
    try:
        extras = Extras.of_batch(held, *ids.shape) if held else None
        return Sequences(ids, positions, _apart(labels, positions, ids), mask, extras)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _apart(labels: Tensor | None, positions: Tensor | None, ids: Tensor) -> Tensor | None:
    """`labels` (N, S − 1) of `labels` (N, S): of packed documents none predicts the first token of another."""
    if positions is None:
        return None if labels is None else labels[:, 1:]
    return (ids if labels is None else labels)[:, 1:].masked_fill(positions[:, 1:] == 0, IGNORED)


def _mask(name: str, mask: Any, ids: Tensor) -> Tensor | None:
    """The mask (N, S), int64; None if it masks nothing."""
    if mask is None:
        return None
    values = _like(f"{name}: attention_mask", _tensor(f"{name}: attention_mask", mask), ids)
    check_mask(f"{name}: attention_mask", values)
    return None if values.all() else values.to(torch.int64)


def _like(name: str, tensor: Tensor, ids: Tensor) -> Tensor:
    if tensor.shape != ids.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; input_ids has {tuple(ids.shape)}")
    return tensor


def _integers(name: str, values: Any) -> Tensor:
    tensor = _tensor(name, values)
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise ValueError(f"{name} has dtype {tensor.dtype}; token ids are integers")
    return tensor.to(torch.int64)


def _tensor(name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values).detach().to("cpu")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} is no rectangular batch of token ids (sequences, tokens): {error}; a tokenizer makes one with "
            "padding=True"
        ) from error


def _check_tokens(name: str, batch: Sequences, vocabulary: int) -> None:
    ids, targets = batch.input_ids, batch.predicted
    for what, tokens in ((f"{name} holds", ids), (f"{name}: labels hold", targets)):
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"{what} token {low if low < 0 else high}; the vocabulary is 0 to {vocabulary - 1}")


def _refuse_mask_as_batch(names: list[str], listed: list[Any]) -> None:
    """A tuple of two is a list of two batches: `(input_ids, attention_mask)` itself must not be taken for one."""
    if len(listed) != 2 or not all(isinstance(each, Tensor | np.ndarray) for each in listed):
        return
    ids, mask = map(torch.as_tensor, listed)
    if ids.shape == mask.shape and ((mask == 0) | (mask == 1)).all() and not ((ids == 0) | (ids == 1)).all():
        raise ValueError(
            f"{names[1]} holds nothing but 0 and 1: an attention mask belongs to its batch, as in "
            "[(input_ids, attention_mask)] or {'input_ids': ..., 'attention_mask': ...}"
        )


def _refuse_unmasked_padding(name: str, batch: Sequences, models: Mapping[str, PreTrainedModel]) -> None:
    """Raises ValueError for rows that begin or end in the padding token of one of `models`, without a mask.

    One token at an end may be text where padding is the begin- or end-of-sequence token too.
    """
    for model in models.values():
        config = model.config.get_text_config(decoder=True)
        pad, most = getattr(config, "pad_token_id", None), 0
        if pad is None:
            continue
        begin, end = (getattr(config, f"{name}_token_id", None) for name in ("bos", "eos"))
        most = int(pad in (begin, *(end if isinstance(end, list) else [end])))
        for side, ids in (("ends", batch.input_ids.flip(1)), ("begins", batch.input_ids)):
            run = (ids == pad).int().cummin(-1).values.sum(-1)
            if (run > most).any():
                row = int((run > most).int().argmax())
                raise ValueError(
                    f"{name}: row {row} {side} with {int(run[row])} tokens {pad}, the model's pad_token_id, and has no "
                    "attention_mask; give one, 0 where it is padding and 1 where it is text"
                )
