"""A Hugging Face causal LM in the terms of the compiled runtime: its weights, norms, windows and scales by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

import e3kernels._runtime as _runtime

# config.model_type → the class whose arithmetic the runtime reproduces; a subclass may compute something else.
SUPPORTED = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


def describe(model: PreTrainedModel) -> _runtime.Model:
    """The compiled runtime's view of `model`, sharing its parameters.

    Raises ValueError for a model type or option that the runtime does not reproduce exactly, for modules that are not
    the type's own and for a configuration that contradicts them, TypeError for weights that are not plain fp32, bf16 or
    fp16 tensors of `nn.Linear`, `nn.Embedding` and the type's RMSNorm, RuntimeError for weights without memory.
    """
    _check_supported(model)
    _check_layer_count(model)
    _check_modules(model)
    config: Any = model.config
    body: Any = model.model
    description = _runtime.Model()
    embedding = body.embed_tokens
    description.embedding = _linear("model.embed_tokens", embedding, nn.Embedding)
    description.head = _linear("lm_head", model.lm_head)
    description.final_norm = _norm("model.norm", body.norm)
    description.heads = config.num_attention_heads
    description.key_value_heads = config.num_key_value_heads
    description.head_dim = body.layers[0].self_attn.head_dim
    description.max_positions = _max_positions(config)
    description.activation = getattr(config, "hidden_activation", None) or config.hidden_act
    description.embedding_scale = _embedding_scale(body)
    description.residual_scale = _residual_scale(body.layers)
    description.logit_scale = 1.0 / getattr(config, "logits_scaling", 1.0)
    description.logit_softcap = getattr(config, "final_logit_softcapping", None) or 0.0
    rotaries = _rotaries(body.rotary_emb)
    description.rotaries = list(rotaries.values())
    description.layers = [_layer(config, index, layer, list(rotaries)) for index, layer in enumerate(body.layers)]
    return description


def _check_supported(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; it must be a transformers causal LM")
    kind = model.config.model_type
    if SUPPORTED.get(kind) != type(model).__name__ or not type(model).__module__.startswith("transformers."):
        raise ValueError(
            f"model is a {type(model).__name__} of type {kind!r}; the runtime reproduces "
            + ", ".join(sorted(SUPPORTED.values()))
        )
    if getattr(model.config, "use_bidirectional_attention", False):
        raise ValueError("model.config.use_bidirectional_attention is set; the runtime decodes causal models")


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


def _weight(name: str, parameter: torch.Tensor) -> torch.Tensor:
    if type(parameter) not in (nn.Parameter, torch.Tensor) or parameter.layout != torch.strided:
        raise TypeError(f"{name} is a {type(parameter).__name__}, {parameter.layout}; it must be a plain dense tensor")
    if parameter.device.type == "meta":
        raise ValueError(f"{name} is on the meta device (offloaded or not loaded); load the whole model on one device")
    return parameter


def _linear(name: str, module: Any, kind: type = nn.Linear, first: int = 0, rows: int | None = None) -> _runtime.Linear:
    scaled_embedding = kind is nn.Embedding and type(module).__name__.endswith("TextScaledWordEmbedding")
    if type(module) is not kind and not scaled_embedding:
        raise TypeError(
            f"{name} is a {type(module).__name__}; the runtime reads plain {kind.__name__} weights "
            "(not quantised, not wrapped by adapters)"
        )
    weight = _weight(f"{name}.weight", module.weight)
    bias = getattr(module, "bias", None)
    if bias is not None:
        _weight(f"{name}.bias", bias)
    return _runtime.Linear(name, weight, bias, first, weight.shape[0] if rows is None else rows)


def _norm(name: str, module: Any) -> _runtime.Norm:
    if not type(module).__name__.endswith("RMSNorm"):
        raise TypeError(f"{name} is a {type(module).__name__}; the runtime computes RMSNorm")
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
    return _runtime.Norm(name, _weight(f"{name}.weight", module.weight), eps, offset)


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


def _rotaries(embedding: Any) -> dict[str | None, _runtime.Rotary]:
    """By layer type where the model has several (Gemma 3), else under None."""
    if isinstance(embedding.rope_type, dict):
        return {
            kind: _runtime.Rotary(
                getattr(embedding, f"{kind}_original_inv_freq"), getattr(embedding, f"{kind}_attention_scaling")
            )
            for kind in embedding.rope_type
        }
    return {None: _runtime.Rotary(embedding.original_inv_freq, embedding.attention_scaling)}


def _layer(config: Any, index: int, module: Any, rotaries: list[str | None]) -> _runtime.Layer:
    name = f"model.layers.{index}"
    attention = module.self_attn
    layer = _runtime.Layer()
    _describe_norms(layer, name, module)
    _describe_attention_weights(layer, f"{name}.self_attn", config, attention)
    _describe_mlp_weights(layer, f"{name}.mlp", module.mlp)
    _check_activation(config, f"{name}.mlp", module.mlp)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[index] if kinds else None
    if kind not in (None, "full_attention", "sliding_attention"):
        raise ValueError(f"layer {index} has attention type {kind!r}; the runtime runs full and sliding attention")
    windowed = kind == "sliding_attention" if kinds else config.model_type in ("mistral", "phi3")
    layer.window = (getattr(config, "sliding_window", None) or 0) if windowed else 0
    layer.rotary = rotaries.index(None if None in rotaries else kind) if getattr(attention, "use_rope", True) else -1
    layer.scale = attention.scaling
    if config.model_type == "gemma2":  # Gemma 3 has the setting and does not apply it
        layer.softcap = attention.attn_logit_softcapping or 0.0
    return layer


def _describe_norms(layer: _runtime.Layer, name: str, module: Any) -> None:
    if hasattr(module, "pre_feedforward_layernorm"):  # Gemma 2 and 3: before and after each block
        layer.mlp_norm = _norm(f"{name}.pre_feedforward_layernorm", module.pre_feedforward_layernorm)
    if hasattr(module, "post_feedforward_layernorm"):  # OLMo 2: after each block only
        layer.mlp_post_norm = _norm(f"{name}.post_feedforward_layernorm", module.post_feedforward_layernorm)
        layer.attention_post_norm = _norm(f"{name}.post_attention_layernorm", module.post_attention_layernorm)
    else:
        layer.mlp_norm = _norm(f"{name}.post_attention_layernorm", module.post_attention_layernorm)
    if hasattr(module, "input_layernorm"):
        layer.attention_norm = _norm(f"{name}.input_layernorm", module.input_layernorm)


def _describe_attention_weights(layer: _runtime.Layer, name: str, config: Any, attention: Any) -> None:
    if hasattr(attention, "qkv_proj"):
        queries, keys = config.num_attention_heads * attention.head_dim, config.num_key_value_heads * attention.head_dim
        layer.query = _linear(f"{name}.qkv_proj", attention.qkv_proj, first=0, rows=queries)
        layer.key = _linear(f"{name}.qkv_proj", attention.qkv_proj, first=queries, rows=keys)
        layer.value = _linear(f"{name}.qkv_proj", attention.qkv_proj, first=queries + keys, rows=keys)
    else:
        layer.query = _linear(f"{name}.q_proj", attention.q_proj)
        layer.key = _linear(f"{name}.k_proj", attention.k_proj)
        layer.value = _linear(f"{name}.v_proj", attention.v_proj)
    layer.output = _linear(f"{name}.o_proj", attention.o_proj)
    if hasattr(attention, "q_norm"):
        layer.query_norm = _norm(f"{name}.q_norm", attention.q_norm)
        layer.key_norm = _norm(f"{name}.k_norm", attention.k_norm)


def _check_activation(config: Any, name: str, mlp: Any) -> None:
    setting = "hidden_activation" if getattr(config, "hidden_activation", None) else "hidden_act"
    part = "activation_fn" if hasattr(mlp, "activation_fn") else "act_fn"
    kind, value = type(getattr(mlp, part)), getattr(config, setting)
    if kind is not type(ACT2FN[value]):
        raise ValueError(f"{name}.{part} is a {kind.__name__}; model.config.{setting} is {value!r}")


def _describe_mlp_weights(layer: _runtime.Layer, name: str, mlp: Any) -> None:
    if hasattr(mlp, "gate_up_proj"):
        rows = mlp.gate_up_proj.weight.shape[0] // 2
        layer.gate = _linear(f"{name}.gate_up_proj", mlp.gate_up_proj, first=0, rows=rows)
        layer.up = _linear(f"{name}.gate_up_proj", mlp.gate_up_proj, first=rows, rows=rows)
    else:
        layer.gate = _linear(f"{name}.gate_proj", mlp.gate_proj)
        layer.up = _linear(f"{name}.up_proj", mlp.up_proj)
    layer.down = _linear(f"{name}.down_proj", mlp.down_proj)
