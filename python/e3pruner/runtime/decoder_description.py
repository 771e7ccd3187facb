"""A Hugging Face causal LM in the terms of the compiled runtime: its weights, norms, windows and scales by layer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

import e3kernels._runtime as _runtime
from e3pruner.runtime.layer_description import describe_layer, layer_input, linear, norm

# config.model_type → the class whose arithmetic the runtime reproduces; a subclass may compute something else.
SUPPORTED = {
    "cohere2": "Cohere2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "granite": "GraniteForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}
_PAIRS_IN_TURN = ("cohere2", "glm4")  # the rotary embedding turns neighbours
# Settings of a supported type that the runtime does not reproduce where they are not 0 or False.
_NOT_REPRODUCED = {
    "use_bidirectional_attention": "the runtime decodes causal models",
    "enable_moe_block": "the runtime has no experts beside an MLP with norms of their own",
}


def describe(model: PreTrainedModel) -> _runtime.Model:
    """The compiled runtime's view of `model`, sharing its parameters.

    Raises ValueError for a model type or option that the runtime does not reproduce exactly, for modules that are not
    the type's own and for a configuration that contradicts them, TypeError for weights that are not plain fp32, bf16 or
    fp16 tensors of `nn.Linear`, `nn.Embedding` and the type's RMSNorm, RuntimeError for weights without memory.
    """
    check_supported(model)
    config: Any = model.config
    body: Any = model.model
    description = _runtime.Model()
    description.embedding = linear("model.embed_tokens", body.embed_tokens, nn.Embedding)
    description.head = linear("lm_head", model.lm_head)
    final_norm = next(part for part in ("norm", "final_layernorm", "embedding_norm") if hasattr(body, part))
    description.final_norm = norm(f"model.{final_norm}", getattr(body, final_norm), config.hidden_size)
    description.max_positions = _max_positions(config)
    _describe_activation(description, config, body.layers)
    description.embedding_scale = _embedding_scale(body)
    description.residual_scale = _residual_scale(body.layers)
    description.logit_scale = getattr(model, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    description.logit_softcap = getattr(config, "final_logit_softcapping", None) or 0.0
    rotaries = _rotaries(config, body.rotary_emb)
    description.rotaries = list(rotaries.values())
    description.layers = [
        describe_layer(config, index, layer, list(rotaries)) for index, layer in enumerate(body.layers)
    ]
    if getattr(config, "hidden_size_per_layer_input", None):
        for index, layer in enumerate(description.layers):
            layer.input = layer_input(body, index)
    return description


def check_supported(model: PreTrainedModel) -> None:
    """Raises as `describe` does for what can be known without weights: the type, its modules, their number."""
    _check_type(model)
    _check_layer_count(model)
    _check_modules(model)


def _check_type(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; it must be a transformers causal LM")
    kind = model.config.model_type
    if SUPPORTED.get(kind) != type(model).__name__ or not type(model).__module__.startswith("transformers."):
        raise ValueError(
            f"model is a {type(model).__name__} of type {kind!r}; the runtime reproduces "
            + ", ".join(sorted(SUPPORTED.values()))
        )
    for setting, reason in _NOT_REPRODUCED.items():
        if value := getattr(model.config, setting, None):
            raise ValueError(f"model.config.{setting} is {value!r}; {reason}")


def _check_layer_count(model: Any) -> None:
    count, layers = model.config.num_hidden_layers, len(model.model.layers)
    if count != layers:
        raise ValueError(
            f"model.config.num_hidden_layers is {count}; model.layers holds {layers}: the model would run "
            f"{min(count, layers)} of them. Set it to {layers}, or cut the layers with e3pruner.prune"
        )


def _check_modules(model: PreTrainedModel) -> None:
    """Every module computes what its class in transformers or torch says."""
    own = type(model).__module__
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__ not in (own, "transformers.activations") and not kind.__module__.startswith("torch.nn."):
            raise ValueError(f"{name} is a {kind.__name__} of {kind.__module__}; the runtime reproduces {own}")
        definition = next(base for base in kind.__mro__ if "forward" in vars(base))
        source = vars(definition)["forward"].__module__
        if source != definition.__module__:
            raise ValueError(
                f"the forward of {definition.__name__} is from {source}; the runtime reproduces that of "
                f"{definition.__module__}"
            )


def _describe_activation(description: _runtime.Model, config: Any, layers: Any) -> None:
    experts: Any = getattr(getattr(layers[0], "mlp", None), "experts", None)
    if hasattr(experts, "limit"):  # GPT-OSS, whose `hidden_act` is not read
        description.activation = "clamped_silu"
        description.glu_slope, description.glu_limit = experts.alpha, experts.limit
    else:
        description.activation = (
            getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or "silu"
        )


def _embedding_scale(body: Any) -> float:
    embedding = body.embed_tokens
    if hasattr(embedding, "embed_scale"):  # Gemma rounds the scale to the weights' dtype
        return float(embedding.embed_scale.to(embedding.weight.dtype))
    return getattr(body, "embedding_multiplier", 1.0)


def _residual_scale(layers: Any) -> float:
    scales = {getattr(layer, "residual_multiplier", 1.0) for layer in layers}
    if len(scales) != 1:
        raise ValueError(f"the layers' residual_multiplier are {sorted(scales)}; the runtime has one for all layers")
    return scales.pop()


def _max_positions(config: Any) -> int:
    """Positions that the model's rotary embedding serves with one set of frequencies."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type") == "longrope":  # beyond it the frequencies change for all positions, cached ones included
        return int(rope["original_max_position_embeddings"])
    return int(config.max_position_embeddings)


def _rotaries(config: Any, embedding: Any) -> dict[str | None, _runtime.Rotary]:
    """By layer type where the model has several (Gemma 3), else under None."""
    in_turn = config.model_type in _PAIRS_IN_TURN or getattr(config, "rope_interleave", False)
    if isinstance(embedding.rope_type, dict):
        return {
            kind: _runtime.Rotary(
                getattr(embedding, f"{kind}_original_inv_freq"),
                getattr(embedding, f"{kind}_attention_scaling"),
                in_turn,
            )
            for kind in embedding.rope_type
        }
    return {None: _runtime.Rotary(embedding.original_inv_freq, embedding.attention_scaling, in_turn)}
