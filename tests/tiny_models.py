"""Small random models of real Hugging Face classes, one a model type, every per-layer feature on.

Weights are large and differ everywhere, biases and norms included, so that a wrong mask, position, window or layer
order shows in the logits. Sliding windows are shorter than the test sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from sweep.weights import randomised
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

NUM_LAYERS = 6
VOCAB_SIZE = 99
WINDOW = 4

_MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "sliding_attention"]
_LAYER_TYPES = [*_MIXED, "full_attention"]
_GQA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
_SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _LAYER_TYPES}
_PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_GPT = {"n_embd": 32, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 64}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GQA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": _GQA | {"sliding_window": WINDOW},
    "qwen2": _GQA | _SLIDING | {"max_window_layers": 2},
    "qwen3": _GQA | _SLIDING | {"head_dim": 16, "attention_bias": True, "max_window_layers": 3},
    "qwen3_moe": _GQA
    | {"use_sliding_window": True, "sliding_window": WINDOW, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 24, "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True},
    "mixtral": _GQA | {"sliding_window": WINDOW, "num_local_experts": 4},
    "gemma": _GQA | {"head_dim": 16, "attention_bias": True},
    "gemma2": _GQA
    | {"head_dim": 16, "sliding_window": WINDOW, "layer_types": _LAYER_TYPES, "query_pre_attn_scalar": 8}
    | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 10.0},
    "gemma3_text": _GQA
    | {"head_dim": 16, "sliding_window": WINDOW, "layer_types": _LAYER_TYPES, "query_pre_attn_scalar": 8},
    "phi": _GQA | {"hidden_act": "gelu_new", "qk_layernorm": True},
    "phi3": _GQA | {"sliding_window": WINDOW, "original_max_position_embeddings": 64},
    "gpt2": _GPT,
    "gpt_neox": _GQA | {"use_parallel_residual": True, "attention_bias": True},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4}
    | {"word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "bloom": {"hidden_size": 32, "n_layer": NUM_LAYERS, "n_head": 4, "apply_residual_connection_post_layernorm": True},
    "falcon": {"hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "num_kv_heads": 2}
    | {"new_decoder_architecture": True, "bias": True, "alibi": True},
    "gptj": _GPT | {"rotary_dim": 4},
    "smollm3": _GQA | _SLIDING | {"no_rope_layers": [1, 0, 1, 1, 0, 1]},
    "olmo2": _GQA | {"attention_bias": True},
    "granite": _GQA
    | {"embedding_multiplier": 2.0, "logits_scaling": 4.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3},
    "cohere2": _GQA | {"sliding_window": WINDOW, "layer_types": _LAYER_TYPES, "logit_scale": 0.25},
    "stablelm": _GQA | {"use_qkv_bias": True, "qk_layernorm": True},
    "starcoder2": _GQA | {"hidden_act": "gelu_pytorch_tanh", "sliding_window": WINDOW, "use_bias": True},
    "gpt_oss": _GQA
    | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}
    | {"layer_types": _LAYER_TYPES},
    "deepseek_v3": _GQA
    | {"num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2}
    | {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 3, "attention_bias": True},
}
# Beyond the types that every room supports: more ways in which settings speak of layers by number.
EXTRA_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 32, "intermediate_size": 48, "num_layers": NUM_LAYERS, "num_heads": 4}
    | {"window_size": WINDOW, "attention_types": [[["global", "local"], 3]], "max_position_embeddings": 64},
    "ernie4_5_moe": _GQA
    | {"moe_layer_start_index": 2, "moe_layer_end_index": 4, "moe_num_experts": 4, "moe_k": 2}
    | {"moe_intermediate_size": 24, "moe_num_shared_experts": 1},
    "llama4_text": _GQA
    | {"head_dim": 16, "intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 2}
    | {"attention_chunk_size": WINDOW, "no_rope_layers": [1, 1, 0, 1, 0, 1]},
    "qwen2_moe": _GQA
    | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3, "decoder_sparse_step": 2}
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
    | {"shared_expert_intermediate_size": 24},
    "jamba": _GQA | {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "gemma4_text": _GQA
    | {"head_dim": 16, "layer_types": _LAYER_TYPES, "sliding_window": WINDOW, "num_kv_shared_layers": 2}
    | {"hidden_size_per_layer_input": 0},
}
EXTRA_CONFIGS["glm4"] = _GQA | {"head_dim": 16, "attention_bias": True, "rope_parameters": _PARTIAL}
EXTRA_CONFIGS["lfm2"] = _GQA | {
    "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention", "conv"],
    "conv_bias": True,
    "block_auto_adjust_ff_dim": False,
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 3}
EXTRA_CONFIGS |= {
    "diffllama": _GQA,
    "minimax": _GQA | _HYBRID | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 4},
    "qwen3_next": _GQA
    | _HYBRID
    | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"shared_expert_intermediate_size": 24, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "mlp_only_layers": [2], "decoder_sparse_step": 2},
}
# Models to which the number of a position matters, not only the distance between two, beside GPT-2 and GPT-Neo: learnt
# positions, sinusoidal ones, or a norm behind the rotation.
POSITION_CONFIGS: dict[str, dict[str, Any]] = {
    "biogpt": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4}
    | {"max_position_embeddings": 64},
    "gpt_bigcode": _GPT,
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": NUM_LAYERS, "attention_heads": 4}
    | {"max_position_embeddings": 64},
    "hunyuan_v1_dense": _GQA | {"head_dim": 8, "attention_bias": True},
}
_MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
_INDEXED = (
    _GQA
    | _MLA
    | {"v_head_dim": 8, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2}
    | {"indexer_types": ["full", "shared", "shared"] * 2, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 3}
    | {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2}
)
# Layers that hand more than the hidden state to the next one.
STATEFUL_CONFIGS: dict[str, dict[str, Any]] = {
    "zaya": _GQA | {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "router_hidden_size": 16},
    "glm_moe_dsa": _INDEXED,
    "hy_v4": _INDEXED,
}
_TOKENS = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of `model_type` in evaluation mode, fp32; `changes` replace settings of its tiny configuration."""
    settings = (TINY_CONFIGS | EXTRA_CONFIGS | POSITION_CONFIGS | STATEFUL_CONFIGS)[model_type]
    config = AutoConfig.for_model(model_type, **settings | _TOKENS | changes)
    return randomised(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(), seed)


def tiny_tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids (batch, length), clear of the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)


def of_one(forward, inputs, masks):
    """The last hidden state of one batch by mask."""
    return {mask: hidden for mask, (hidden,) in forward.last_hiddens([inputs], masks)}
