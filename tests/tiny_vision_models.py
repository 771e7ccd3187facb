"""Small random image-text models of real Hugging Face classes, and batches with images for them."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import _GQA, _LAYER_TYPES, _TOKENS, WINDOW, randomised, tiny_tokens
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 90, 91, 92, 93
_SIZE, _PATCH = 16, 4
_IDS = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN}
_QWEN_IDS = _IDS | {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_QWEN_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "patch_size": _PATCH}
_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "image_size": _SIZE,
    "patch_size": _PATCH,
}
_DEEPSTACK = _QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
_QWEN3 = _GQA | _MROPE | {"head_dim": 8}

TINY_VISION_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _GQA | {"head_dim": 16, "sliding_window": WINDOW, "layer_types": _LAYER_TYPES} | _TOKENS,
        "vision_config": _CLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE_TOKEN,
        "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
    },
    "internvl": {
        "text_config": _GQA | _TOKENS | {"model_type": "qwen2"},
        "vision_config": _CLIP | {"image_size": [_SIZE, _SIZE], "patch_size": [_PATCH, _PATCH]},
        "image_seq_length": 4,
        **_IDS,
    },
    "llava": {
        "text_config": _GQA | _TOKENS | {"model_type": "llama"},
        "vision_config": _CLIP | {"model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": IMAGE_TOKEN,
        "image_seq_length": 16,
    },
    "qwen2_5_vl": {
        "text_config": _GQA | _MROPE | _TOKENS,
        "vision_config": _QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]},
        **_QWEN_IDS,
    },
    "qwen3_vl": {"text_config": _QWEN3 | _TOKENS, "vision_config": _DEEPSTACK, **_QWEN_IDS},
    "qwen3_vl_moe": {
        "text_config": _QWEN3 | _TOKENS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        "vision_config": _DEEPSTACK,
        **_QWEN_IDS,
    },
}
_DEPTHS = ("depth", "num_hidden_layers")


def tiny_vision_model(model_type: str, seed: int = 0, vision_layers: int = 2, **changes: Any) -> PreTrainedModel:
    """A model of `model_type` in evaluation mode, fp32, with `NUM_LAYERS` text layers; `changes` are of its text."""
    settings = dict(TINY_VISION_CONFIGS[model_type])
    depth = _DEPTHS["num_heads" not in settings["vision_config"]]
    settings["vision_config"] = settings["vision_config"] | {depth: vision_layers}
    settings["text_config"] = settings["text_config"] | changes
    config = AutoConfig.for_model(model_type, **settings)
    return randomised(AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval(), seed)


def image_batch(model: PreTrainedModel, seed: int = 0, length: int = 12) -> dict[str, torch.Tensor]:
    """Two rows of text with an image in each, `length` tokens beside those of the image."""
    kind = model.config.model_type
    generator = torch.Generator().manual_seed(seed)
    count = {"llava": 16}.get(kind, 4)
    text = tiny_tokens(2, length, seed) % IMAGE_TOKEN
    image = torch.full((2, count), IMAGE_TOKEN)
    edges = [torch.full((2, 1), token) for token in (VISION_START, VISION_END)]
    ids = torch.cat([text[:, :2], edges[0], image, edges[1], text[:, 2:]], dim=1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind.startswith("qwen"):
        patches = (_SIZE // _PATCH) ** 2
        batch["pixel_values"] = torch.randn(2 * patches, 3 * 2 * _PATCH**2, generator=generator)
        batch["image_grid_thw"] = torch.tensor([[1, _SIZE // _PATCH, _SIZE // _PATCH]] * 2)
        batch["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    else:
        batch["pixel_values"] = torch.randn(2, 3, _SIZE, _SIZE, generator=generator)
    if kind == "gemma3":
        batch["token_type_ids"] = (ids == IMAGE_TOKEN).int()
    return batch
