"""A batch with an image in every row for any image-text type: the form of pixels that its own forward pass reads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

IMAGE_TOKEN, SIZE, PATCH, GRID = 90, 16, 4, 4
_BEFORE = 6  # tokens of text before the image
Batch = dict[str, Tensor]


class NoImageError(Exception):
    """No form of pixels that was tried is one that the model reads."""


@torch.no_grad()
def with_images(model: PreTrainedModel, ids: Tensor) -> Batch:
    """`ids` (B, T) with an image behind the first tokens of every row, and all that the model is told of it.

    It is read: other pixels give other logits, all of them finite. Raises NoImageError with what each form came to.
    """
    tried = []
    for form in _forms(model, len(ids)):
        try:
            batch = _placed(model, ids, form)
            logits = model(**batch, use_cache=False).logits
            other = model(**_negated(batch), use_cache=False).logits
        except Exception as error:
            tried.append(f"{_shapes(form)}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
            continue
        if logits.isfinite().all() and not torch.equal(logits, other):
            return batch
        tried.append(f"{_shapes(form)}: not read")
    raise NoImageError("; ".join(tried))


def takes_images(model: PreTrainedModel) -> bool:
    return any("pixel_values" in name for name in _takes(model.forward))


def _forms(model: PreTrainedModel, rows: int) -> Iterator[Batch]:
    """What the pixels of an image in each of `rows` rows may look like."""
    takes = _takes(model.forward)
    vision = getattr(model.config, "vision_config", None)
    generator = torch.Generator().manual_seed(2)

    def pixels(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    beside = {name: value for name, value in _beside(rows).items() if name in takes}
    if "pixel_values_images" in takes:
        yield {"pixel_values_images": pixels(rows, 3, SIZE, SIZE)}
    if "image_grid_thw" in takes:
        depth = getattr(vision, "temporal_patch_size", 1)
        beside["image_grid_thw"] = torch.tensor([[1, GRID, GRID]] * rows)
        for shape in ((3 * depth * PATCH**2,), (3, PATCH, PATCH), (3 * PATCH**2,), (6 * PATCH**2,), (8, 8, 3)):
            yield beside | {"pixel_values": pixels(rows * GRID**2, *shape)}
    if "image_grid_hw" in takes:
        yield {
            "pixel_values": pixels(rows * GRID**2, 3 * PATCH**2),
            "image_grid_hw": torch.tensor([[GRID, GRID]] * rows),
        }
    if "image_token_pooling" in takes:
        yield {
            "pixel_values": pixels(rows, GRID**2, 3 * PATCH**2),
            "image_token_pooling": torch.arange(rows * GRID**2).view(-1, GRID),
            "image_grids": torch.tensor([[2, 2, 0, 0]] * rows),
            "image_num_crops": torch.ones(rows, dtype=torch.int64),
        }
    if "image_patches" in takes:
        yield {"image_patches": pixels(rows, GRID**2, 3 * PATCH**2)}
    yield {"pixel_values": pixels(rows, 2, PATCH, PATCH, 3)}
    if "spatial_shapes" in takes:
        beside["pixel_attention_mask"] = torch.ones(rows, GRID**2, dtype=torch.int64)
    if "spatial_shapes" in takes or "image_position_ids" in takes:
        yield beside | {"pixel_values": pixels(rows, GRID**2, 3 * PATCH**2)}
    if "target_sizes" in takes:
        yield beside | {"pixel_values": pixels(rows, 3, PATCH, PATCH * GRID**2)}
        yield beside | {"pixel_values": pixels(1, 3, PATCH, rows * PATCH * GRID**2)}
    if "pixel_attention_mask" in takes and "pixel_attention_mask" not in beside:
        whole = torch.ones(rows, 1, SIZE, SIZE, dtype=torch.int64)
        yield {"pixel_attention_mask": whole, "pixel_values": pixels(rows, 1, 3, SIZE, SIZE)}
        yield {"pixel_attention_mask": whole[:, 0], "pixel_values": pixels(rows, 3, SIZE, SIZE)}
    for shape in ((3, SIZE, SIZE), (1, 3, SIZE, SIZE), (1, 4, 3, SIZE, SIZE), (2, 3, SIZE, SIZE), (3, 3, SIZE, SIZE)):
        yield beside | {"pixel_values": pixels(rows, *shape)}
        yield {n: v for n, v in beside.items() if n != "image_sizes"} | {"pixel_values": pixels(rows, *shape)}


def _beside(rows: int) -> Batch:
    """What some types ask for beside the pixels of one image per row."""
    positions = torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="xy"), dim=-1)
    return {
        "image_sizes": torch.tensor([[SIZE, SIZE]] * rows),
        "image_merge_sizes": torch.full((rows,), 2),
        "spatial_shapes": torch.tensor([[GRID, GRID]] * rows),
        "target_sizes": torch.tensor([[GRID, GRID]] * rows),
        "image_position_ids": positions.reshape(1, -1, 2).expand(rows, -1, -1),
        "high_res_pixel_values": torch.randn(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3)),
        "qformer_input_ids": torch.arange(5).expand(rows, -1),
        "qformer_attention_mask": torch.ones(rows, 5, dtype=torch.int64),
        "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(rows, 1, 4, dtype=torch.int64),
    }


def _placed(model: PreTrainedModel, ids: Tensor, form: Batch) -> Batch:
    """`ids` with so many placeholders in every row as there are features of its image, and what is told per token."""
    takes = _takes(model.forward)
    known = _placeholders(model)
    count = _features(model, form) // len(ids) if known else getattr(model.config, "latent_query_num", 0)
    hole = torch.full((len(ids), count), IMAGE_TOKEN if known else 5)
    ids = torch.cat([ids[:, :_BEFORE], hole, ids[:, _BEFORE:]], dim=1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **form}
    for name in {"token_type_ids", "mm_token_type_ids"} & takes.keys():
        batch[name] = (ids == IMAGE_TOKEN).long()
    if "image_attention_mask" in takes:
        batch["image_attention_mask"] = torch.ones(*ids.shape, 1, dtype=torch.int64)
    if "cross_attention_mask" in takes:
        batch["cross_attention_mask"] = torch.ones(*ids.shape, 1, 4, dtype=torch.int64)
    if "image_embeds_position_mask" in takes:
        places = torch.arange(ids.shape[1])
        held = (places >= _BEFORE) & (places < _BEFORE + count)
        batch["image_embeds_position_mask"] = held.long().expand(len(ids), -1)
    return batch


def _features(model: PreTrainedModel, form: Batch) -> int:
    """How many features the images of `form` have."""
    names = ("get_image_features", "get_video_features")
    read = next((getattr(each, n) for n in names for each in (model.base_model, model) if hasattr(each, n)), None)
    if read is None:
        return 0
    takes = _takes(read)
    found: Any = read(**{name: value for name, value in form.items() if name in takes})
    if getattr(found, "pooler_output", None) is not None:
        found = found.pooler_output
    elif hasattr(found, "deepstack_features"):  # of each layer that is given some
        found = found.deepstack_features[0][-1]
    parts = found if isinstance(found, list | tuple) else [found]
    return sum(part.numel() // part.shape[-1] for part in parts)


def _placeholders(model: PreTrainedModel) -> bool:
    named = ("image_token_id", "image_token_index", "video_token_index")
    known = any(getattr(model.config, name, None) == IMAGE_TOKEN for name in named)
    return known or IMAGE_TOKEN in (getattr(model.config, "vocabulary_map", None) or {}).values()


def _takes(function: Any) -> Any:
    return inspect.signature(function).parameters


def _negated(batch: Batch) -> Batch:
    return {name: -3 * value if value.is_floating_point() else value for name, value in batch.items()}


def _shapes(form: Batch) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in form.items() if value.is_floating_point())
