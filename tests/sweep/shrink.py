"""Any model type of transformers, small: its default configuration with every size reduced and every list of layers
shortened by the same choice of layers.

Widths, heads and head dimensions are chosen to fit together (32 = 4 · 8), the number of layers of the language model
belongs to nothing else, and windows are shorter than the sequences that the checks use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoModel,
    EvollaForProteinText2Text,
    Gemma3nVisionConfig,
    MusicgenForCausalLM,
    MusicgenMelodyForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import is_timm_available

from .weights import randomised

LAYERS, OTHER_LAYERS, VOCABULARY, WINDOW = 6, 2, 99, 4

_COUNTS = "num_hidden_layers n_layers? num_layers num_blocks layers ((en|de)coder|num_(en|de)coder)_layers"
# Name of a setting: its small value. The first pattern that fits the whole name decides.
_SIZES = {
    "type_vocab_size|task_type_vocab_size": 2,
    ".*vocab_size.*|encoder_hash_byte_group_vocab|ngram_vocab_size_base|num_embeddings": VOCABULARY,
    "depth|num_lstm_layers": OTHER_LAYERS,
    "(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups": 2,
    "(.*_)?(num_)?(attention_)?heads|n_heads?|(.*_)?n_heads|(.*_)?num_(attention_|key_|value_)?heads": 4,
    "(.*_)?qk_head_dim|index_head_dim|mamba_(d_head|head_?dim)|attention_head_dim": 16,
    "(.*_)?head_dim|.*_head_dim|dim_head|d_kv|d_head|kv_channels|rotary_dim|d_rel|attention_head_size": 8,
    "hidden_size_per_layer_input": 8,
    "projection_dim|(.*_)?hidden_size(_.*)?|d_model|n_embd|(.*_)?embed_dim|emb_dim|embedding_dim": 32,
    "(.*_)?embedding_size": 32,
    "word_embed_proj_dim|lru_width|backbone_hidden_size|.*embed_dim|output_dim|adapter_out_dim|mamba_d_ssm": 32,
    "(.*_)?intermediate_size(_.*)?|(.*_)?ffn_dim|d_ff|dff|dim_ff|d_inner|ffn_hidden_size|mlp_dim|feed_forward_size": 48,
    "expert_ffn_hidden_size|share_expert_dim": 48,
    ".*_rank|.*_state_size|.*_d_state|state_size|lora_dim": 16,
    "num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|zero_expert_num": 4,
    "num_experts_per_tok(en)?|moe_k|moe_top_?k|n_group|num_expert_group": 2,
    "codebook_size": 64,
    "topk_group|(.*_)?num_shared_experts|n_shared_experts": 1,
    ".*max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|context_length|model_max_length": 64,
    "(attention_|local_attention_|keep_)?(sliding_)?window(_size|_len)?|attention_chunk_size|local_attention": WINDOW,
    "index_topk|sliding_window_size": WINDOW,
    "(mamba_)?n_groups|mamba_ngroups": 2,
    "(mamba_)?chunk_size|max_inference_chunksize": 8,
    "num_kv_shared_layers|first_k_dense_replace|max_window_layers|num_dense_layers": 2,
    "image_size|resolution|crop_size": 16,
    "patch_size": 4,
    "mm_tokens_per_image": 4,
}
# What the default of a type leaves open, or does not follow from the sizes above.
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
_QWEN4 = (
    _INDEXER
    | {"eos_token_id": 2}
    | {"indexer_compress_ratio": 2, "ple_layer_ids": [2, 3], "split_ngram_parts": 1, "ple_embed_dim": 16}
)
# Text has tokens below 90.
_TOKENS = {"bos_token": 1, "eos_token": 2, "pad_token": 0, "image_token": 90, "video_token": 91, "audio_token": 92}
_TOKENS |= {"vision_start_token": 93, "vision_end_token": 94, "image_start_token": 93, "image_end_token": 94}
_TOKENS |= {"video_start_token": 95, "video_end_token": 96, "boi_token": 93, "eoi_token": 94}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_PARTIAL = _ROPE | {"partial_rotary_factor": 0.5}
_NEEDED = {"gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}}
_MROPE = _ROPE | {"mrope_section": [2, 1, 1]}
_OF_MROPE = {"text_config": {"rope_parameters": _MROPE}}
_WINDOWED = {"vision_config": {"window_size": 16}}
_TILES = {"image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]]}
_CHANGES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "audio_config": {"codebook_dim": 32, "codebook_size": 8},
        "vision_config": {"codebook_size": 8},
        "image_token_offset": 70,
        "audio_token_offset": 78,
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "chameleon": {
        "vocabulary_map": {"<image>": 90} | {f"IMGIMG{chr(65 + i)}Z": i + 10 for i in range(10)},
        "vq_config": {"num_embeddings": 10},
    },
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE}}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4, "num_experts_per_tok": 2}
        | {"max_position_embeddings": 256}
    },
    "emu3": {
        "vocabulary_map": {"<image>": 90, "<|extra_200|>": 89} | {f"<|visual token {i:06d}|>": i + 3 for i in range(64)}
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}}},
    "exaone4_5": _WINDOWED,
    "fast_vlm": {"vision_config": {"hidden_size": 3072}},
    "glm46v": _OF_MROPE,
    "glm4v": _OF_MROPE,
    "glm4v_moe": {"text_config": {"rope_parameters": _PARTIAL | {"mrope_section": [1, 1, 0]}}},
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "glm_ocr": _OF_MROPE,
    "glmga": _OF_MROPE,
    "granite4_vision": _TILES
    | {
        "deepstack_layer_map": [[-2, 0], [-1, 2]],
        "spatial_target_layers": [0, 1, 2, 3],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "hunyuan_vl": {"text_config": {"head_dim": 8, "rope_parameters": _MROPE}},
    "hyperclovax_vision_v2": _WINDOWED,
    "idefics2": {"text_config": {"max_position_embeddings": 256}},
    "instructblipvideo": {"video_token_index": 90},
    "kosmos-2": {"latent_query_num": 4},
    "llama4": {
        "vision_config": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        "text_config": {"output_router_logits": False},
    },
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "mistral4": {"rope_parameters": _ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}},
    "mllama": {"vision_config": {"intermediate_layers_indices": [1, 2], "vision_output_dim": 96}},
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [4, 2]},
        "vision_config": {"image_size": [16, 16], "num_position_embeddings": 16},
    },
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4}, "out_hidden_size": 128},
    "paddleocr_vl": _OF_MROPE,
    "qwen2_5_omni_thinker": _OF_MROPE | _WINDOWED | {"vision_start_token_id": 93},
    "qwen2_5_vl": _OF_MROPE | _WINDOWED,
    "qwen2_vl": _OF_MROPE,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 93},
    "step3p7": {"text_config": {"sliding_window": WINDOW}},
    "vipllava": {"vision_feature_layers": [-2, -3]},
    "bamba": {"attn_layer_indices": [1, 4]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "dory": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
    },
    "dots3_note": {
        "text_config": {"head_dim": 16},
        "vision_config": {"adapter_in_dim": 32},
        "audio_config": {"adapter_input_size": 32},
    },
    "dots3_note_text": {"head_dim": 16},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 16},
    "mimo_v2_flash": {"rope_parameters": {"full_attention": _PARTIAL, "sliding_attention": _PARTIAL}},
    "gemma4_assistant": {"text_config": {"num_kv_shared_layers": 0}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 0}},
    "ministral": {"head_dim": 8},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe", "mlp"]},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "rwkv": {"rescale_every": 0},
    "reformer": {"axial_pos_embds": False},
    "xlstm": {
        "qk_dim_factor": 1.0,
        "chunk_size": 64,
        "max_inference_chunksize": 64,
        "hidden_size": 64,
        "embedding_dim": 64,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["hybrid", "linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [0, 2, 3, 5]}
    | {"num_mem_blocks": 2}
    | {"attention_hidden_size": 64, "use_shared_attention_adapter": True, "adapter_rank": 4},
}
# What the small model of a type is not, which its row of the page says.
NOTES = {"rwkv": "of rescale_every=0; other values are refused with that advice"}
# Classes that transformers' own table gives the configuration of a larger model, which they cannot read.
_CLASSES = {
    "evolla": EvollaForProteinText2Text,
    "musicgen_decoder": MusicgenForCausalLM,
    "musicgen_melody_decoder": MusicgenMelodyForCausalLM,
}


class _Tower(PreTrainedModel):
    """In place of the vision tower of Gemma 3n where timm cannot be imported: no text passes it."""

    config_class, main_input_name = Gemma3nVisionConfig, "pixel_values"

    def __init__(self, config: Gemma3nVisionConfig) -> None:
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.post_init()


if not is_timm_available():
    AutoModel.register(Gemma3nVisionConfig, _Tower, exist_ok=True)
    NOTES["gemma3n"] = "its vision tower, of timm, is stood in for"

_PATTERNS = [(re.compile(pattern), value) for pattern, value in _SIZES.items()]


def small_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of `model_type` with `LAYERS` decoder layers; `changes` replace its small settings."""
    kind = CONFIG_MAPPING[model_type]
    needed = _NEEDED.get(model_type, {})
    small = _joined(_shrunk(kind(**needed).to_dict()), _CHANGES.get(model_type, {}), changes)
    for name in ("model_type", "transformers_version", "architectures", "number_of_conv_states"):  # the last is derived
        small.pop(name, None)
    config = kind(**small)
    return config.decoder if model_type in ("musicgen", "musicgen_melody") else config


def small_model(config: PreTrainedConfig, auto: Any, seed: int = 0) -> PreTrainedModel:
    """A random model in fp32 and evaluation mode; its weights are large and differ, biases and norms included."""
    torch.manual_seed(seed)
    build = _CLASSES[config.model_type]._from_config if config.model_type in _CLASSES else auto.from_config
    return randomised(build(config, attn_implementation="eager").eval(), seed)


def _joined(settings: dict[str, Any], *changes: dict[str, Any]) -> dict[str, Any]:
    joined = dict(settings)
    for name, value in (item for each in changes for item in each.items()):
        nested = isinstance(value, dict) and isinstance(joined.get(name), dict) and name.endswith("_config")
        joined[name] = _joined(joined[name], value) if nested else value
    return joined


def _shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(name, str) for name in settings):
        return settings
    count = next((settings[name] for name in settings if _is_count(name) and isinstance(settings[name], int)), 0)
    chosen = _layers(settings, count)
    small = {name: _small(name, value, count, chosen) for name, value in settings.items()}
    _keep_ratios(settings, small)
    return small


def _is_count(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in _COUNTS.split())


def _layers(settings: dict[str, Any], count: int) -> list[int]:
    """Which of `count` layers stay: the first of each kind, and the first ones."""
    lists = [value for value in settings.values() if isinstance(value, list | tuple) and len(value) == count]
    kinds = [tuple(str(value[layer]) for value in lists) for layer in range(count)]
    first = sorted(kinds.index(kind) for kind in dict.fromkeys(kinds))[:LAYERS]
    rest = [layer for layer in range(count) if layer not in first]
    return sorted([*first, *rest[: LAYERS - len(first)]])


def _small(name: str, value: Any, count: int, chosen: Sequence[int]) -> Any:
    if name == "per_layer_config" and value:
        return {chosen.index(int(old)): _shrunk(each) for old, each in value.items() if int(old) in chosen}
    if isinstance(value, dict) and name not in ("id2label", "label2id"):
        return _shrunk(value)
    if name == "is_decoder":  # of BERT's family: else it attends to both sides
        return True
    if name in ("image_size", "patch_size") and isinstance(value, list | tuple):
        return [min({"image_size": 16, "patch_size": 4}[name], each) for each in value]
    if isinstance(value, list | tuple):
        if name == "downsample_channels":  # the last is what reads them
            return [32] * len(value)
        if name == "mrope_section":
            return [2, 1, 1]
        if count > LAYERS and len(value) == count:
            return [value[layer] for layer in chosen]
        if value and all(type(each) is int for each in value):
            return (
                [each for each in value if each < LAYERS] if name.endswith(("layer_ids", "_layers", "idxs")) else value
            )
        return value
    if value is None and re.fullmatch("(image|video|audio)_token_(id|index)", name):
        return _TOKENS[name.rpartition("_")[0]]
    if type(value) is not int:
        return value
    if _is_count(name):
        return LAYERS
    if name.endswith(("token_id", "token_index")):
        return _TOKENS.get(name.removesuffix("_id").removesuffix("_index"), min(value, VOCABULARY - 1))
    small = next((size for pattern, size in _PATTERNS if pattern.fullmatch(name)), value)
    return min(small, value) if value >= 0 else value


def _keep_ratios(settings: dict[str, Any], small: dict[str, Any]) -> None:
    """As many key-value heads as heads, or one, where the default has that; inner sizes that must be a multiple."""
    for name in small:
        heads = re.sub("num_key_value_heads|num_kv_heads", "num_attention_heads", name)
        if heads != name and settings.get(name) is not None and settings.get(name) == settings.get(heads):
            small[name] = small[heads]
