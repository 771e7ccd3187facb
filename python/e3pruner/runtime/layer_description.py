"""One layer of a Hugging Face decoder in the terms of the compiled runtime: facts read from its modules by their names.

A fact is what a layer does, not which type it is of: it has these norms, this router, these sinks. The names are those
that transformers gives the parts in the types of `decoder_description.SUPPORTED`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

import e3kernels._runtime as _runtime

# Types whose mask is windowed in every layer where `sliding_window` is set, without a list of layer types.
_WINDOWED = ("mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2")
_NORMS_AROUND_ONE = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")


def describe_layer(config: Any, index: int, module: Any, rotaries: list[str | None]) -> _runtime.Layer:
    """`module`, which is layer `index` of a model with `config`; `rotaries` names the model's rotary embeddings."""
    name = f"model.layers.{index}"
    layer = _runtime.Layer()
    kinds = getattr(config, "layer_types", None)
    kind = kinds[index] if kinds else None
    _describe_norms(layer, name, module)
    if kind == "conv":
        _describe_conv(layer, f"{name}.conv", module.conv)
    elif kind in (None, "full_attention", "sliding_attention"):
        own = config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config
        _describe_attention(layer, f"{name}.self_attn", own, module.self_attn)
        if getattr(module.self_attn, "is_kv_shared_layer", False):
            layer.cache_of = _producer(config, kind)
        windowed = kind == "sliding_attention" if kinds else config.model_type in _WINDOWED
        layer.window = (getattr(config, "sliding_window", None) or 0) if windowed else 0
        if _is_rotated(config, module.self_attn):
            layer.rotary = rotaries.index(None if None in rotaries else kind)
    else:
        raise ValueError(
            f"layer {index} has attention type {kind!r}; the runtime runs full and sliding attention and convolutions"
        )
    _describe_mlp(layer, *_part(name, module, "mlp", "feed_forward"), config)
    if hasattr(module, "layer_scalar"):
        layer.output_scale = float(module.layer_scalar)
    return layer


def layer_input(body: Any, index: int) -> _runtime.LayerInput:
    """What layer `index` of the decoder `body` adds from its part of the per-layer embedding (Gemma 4)."""
    name, layer, table = f"model.layers.{index}", body.layers[index], body.embed_tokens_per_layer
    described, size = _runtime.LayerInput(), layer.per_layer_input_gate.weight.shape[0]
    described.size, described.first = size, index * size
    described.embedding = _runtime.Weight(
        "model.embed_tokens_per_layer.weight", plain_weight("model.embed_tokens_per_layer.weight", table.weight)
    )
    described.embedding_scale = float(table.embed_scale.to(table.weight.dtype))
    described.projection = linear(
        "model.per_layer_model_projection", body.per_layer_model_projection, first=index * size, rows=size
    )
    described.projection_scale, described.scale = body.per_layer_model_projection_scale, body.per_layer_input_scale
    described.norm = norm("model.per_layer_projection_norm", body.per_layer_projection_norm, size)
    described.gate = linear(f"{name}.per_layer_input_gate", layer.per_layer_input_gate)
    described.output = linear(f"{name}.per_layer_projection", layer.per_layer_projection)
    described.output_norm = norm(f"{name}.post_per_layer_input_norm", layer.post_per_layer_input_norm, 0)
    return described


def linear(name: str, module: Any, kind: type = nn.Linear, first: int = 0, rows: int | None = None) -> _runtime.Linear:
    """Rows [first, first + rows) of a plain `kind` module's weight and bias."""
    scaled_embedding = kind is nn.Embedding and type(module).__name__.endswith("TextScaledWordEmbedding")
    if type(module) is not kind and not scaled_embedding:
        raise TypeError(
            f"{name} is a {type(module).__name__}; the runtime reads plain {kind.__name__} weights "
            "(not quantised, not wrapped by adapters)"
        )
    return _rows(name, module, first, rows)


def norm(name: str, module: Any, size: int) -> _runtime.Norm:
    """An RMSNorm or LayerNorm of `size` elements, which it need not have a weight for, or one for each head."""
    kind = type(module).__name__
    parts = list(getattr(module, "norms", [module]))
    if not kind.endswith(("RMSNorm", "LayerNorm", "LayerNormPerHead")):
        raise TypeError(f"{name} is a {kind}; the runtime computes RMSNorm and LayerNorm")
    weights = [weight for part in parts if (weight := getattr(part, "weight", None)) is not None]
    bias = getattr(parts[0], "bias", None)
    return _runtime.Norm(
        name,
        [plain_weight(f"{name}.weight", weight) for weight in weights],
        None if bias is None else plain_weight(f"{name}.bias", bias),
        weights[0].numel() if weights else size,
        parts[0].eps if hasattr(parts[0], "eps") else parts[0].variance_epsilon,
        1.0 if kind in _NORMS_AROUND_ONE else 0.0,
        "LayerNorm" in kind,
    )


def plain_weight(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """`parameter`, or TypeError and ValueError for one that is no plain tensor with memory."""
    if type(parameter) not in (nn.Parameter, torch.Tensor) or parameter.layout != torch.strided:
        raise TypeError(f"{name} is a {type(parameter).__name__}, {parameter.layout}; it must be a plain dense tensor")
    if parameter.device.type == "meta":
        raise ValueError(f"{name} is on the meta device (offloaded or not loaded); load the whole model on one device")
    return parameter


def _rows(name: str, module: Any, first: int = 0, rows: int | None = None) -> _runtime.Linear:
    weight = plain_weight(f"{name}.weight", module.weight)
    bias = getattr(module, "bias", None)
    if bias is not None:
        plain_weight(f"{name}.bias", bias)
    return _runtime.Linear(name, weight, bias, first, weight.shape[0] if rows is None else rows)


def _part(name: str, module: Any, *names: str) -> tuple[str, Any]:
    """The name and module of the first part of `names` that `module` has."""
    for part in names:
        if getattr(module, part, None) is not None:
            return f"{name}.{part}", getattr(module, part)
    raise ValueError(f"{name} has none of {', '.join(names)}; the runtime does not know such a {type(module).__name__}")


def _describe_norms(layer: _runtime.Layer, name: str, module: Any) -> None:
    def of(part: str) -> _runtime.Norm | None:
        return norm(f"{name}.{part}", getattr(module, part), 0) if getattr(module, part, None) is not None else None

    layer.attention_norm = of("input_layernorm") or of("operator_norm")
    behind_attention = "post_self_attn_layernorm"  # GLM-4
    if hasattr(module, "post_feedforward_layernorm"):  # Gemma 2 to 4; OLMo 2 has no norms before its blocks
        behind_attention = "post_attention_layernorm"
        layer.mlp_norm = of("pre_feedforward_layernorm")
    else:
        layer.mlp_norm = of("post_attention_layernorm") or of("ffn_norm")
        layer.parallel = layer.mlp_norm is None
        layer.mlp_norm = layer.mlp_norm or layer.attention_norm
    layer.attention_post_norm = of(behind_attention)
    layer.mlp_post_norm = of("post_feedforward_layernorm") or of("post_mlp_layernorm")


def _is_rotated(config: Any, attention: Any) -> bool:
    if config.model_type == "cohere2":  # position is left to the layers with a window
        return attention.sliding_window is not None
    return bool(getattr(attention, "use_rope", True))


def _describe_attention(layer: _runtime.Layer, name: str, config: Any, attention: Any) -> None:
    layer.heads, layer.scale = config.num_attention_heads, attention.scaling
    layer.output = linear(*_part(name, attention, "o_proj", "dense", "out_proj"))
    if hasattr(attention, "sinks"):
        layer.sinks = _runtime.Weight(f"{name}.sinks", plain_weight(f"{name}.sinks", attention.sinks))
    if config.model_type == "gemma2":  # Gemma 3 has the setting and does not apply it
        layer.softcap = attention.attn_logit_softcapping or 0.0
    if hasattr(attention, "kv_b_proj"):
        _describe_latent_attention(layer, name, attention)
    else:
        _describe_heads(layer, name, config, attention)


def _producer(config: Any, kind: str | None) -> int:
    """The layer whose keys and values those of `kind` behind the first shared one read: the last of its kind before."""
    modes = zip(config.kv_sharing_modes, config.layer_types, strict=True)
    return next(index for index, mode in enumerate(modes) if mode == ("store", kind))


def _describe_heads(layer: _runtime.Layer, name: str, config: Any, attention: Any) -> None:
    layer.head_dim = layer.value_dim = attention.head_dim
    layer.key_value_heads = config.num_key_value_heads
    if hasattr(attention, "qkv_proj"):
        queries, keys = config.num_attention_heads * attention.head_dim, config.num_key_value_heads * attention.head_dim
        layer.query = linear(f"{name}.qkv_proj", attention.qkv_proj, first=0, rows=queries)
        layer.key = linear(f"{name}.qkv_proj", attention.qkv_proj, first=queries, rows=keys)
        layer.value = linear(f"{name}.qkv_proj", attention.qkv_proj, first=queries + keys, rows=keys)
    else:
        layer.query = linear(f"{name}.q_proj", attention.q_proj)
        if hasattr(attention, "k_proj"):
            layer.key = linear(f"{name}.k_proj", attention.k_proj)
        if getattr(attention, "v_proj", None) is not None:
            layer.value = linear(f"{name}.v_proj", attention.v_proj)
    for kind in ("query", "key", "value"):
        names = (f"{kind[0]}_norm", f"{kind[0]}_layernorm")
        if any(hasattr(attention, part) for part in names):
            setattr(layer, f"{kind}_norm", norm(*_part(name, attention, *names), attention.head_dim))


def _describe_latent_attention(layer: _runtime.Layer, name: str, attention: Any) -> None:
    latent = _runtime.Latent()
    latent.rank, latent.value_dim = attention.kv_lora_rank, attention.v_head_dim
    latent.plain, latent.rotated = attention.qk_nope_head_dim, attention.qk_rope_head_dim
    latent.up = linear(f"{name}.kv_b_proj", attention.kv_b_proj)
    latent.norm = norm(f"{name}.kv_a_layernorm", attention.kv_a_layernorm, 0)
    if attention.q_lora_rank is None:
        layer.query = linear(f"{name}.q_proj", attention.q_proj)
    else:
        latent.query_down = linear(f"{name}.q_a_proj", attention.q_a_proj)
        latent.query_norm = norm(f"{name}.q_a_layernorm", attention.q_a_layernorm, 0)
        layer.query = linear(f"{name}.q_b_proj", attention.q_b_proj)
    layer.key = linear(f"{name}.kv_a_proj_with_mqa", attention.kv_a_proj_with_mqa)
    layer.key_value_heads, layer.value_dim = 1, latent.rank
    layer.head_dim = latent.rank + latent.rotated
    layer.latent = latent


def _describe_conv(layer: _runtime.Layer, name: str, conv: Any) -> None:
    kernel = conv.conv
    layer.conv = _runtime.Conv(
        f"{name}.conv",
        linear(f"{name}.in_proj", conv.in_proj),
        plain_weight(f"{name}.conv.weight", kernel.weight),
        None if kernel.bias is None else plain_weight(f"{name}.conv.bias", kernel.bias),
    )
    layer.output = linear(f"{name}.out_proj", conv.out_proj)
    layer.key_value_heads, layer.head_dim = 1, kernel.weight.shape[0]


def _describe_mlp(layer: _runtime.Layer, name: str, mlp: Any, config: Any) -> None:
    if not hasattr(mlp, "experts"):
        _describe_dense(layer, name, mlp, config)
        return
    layer.experts = _experts(name, mlp)
    _check_activation(config, f"{name}.experts", mlp.experts)
    if hasattr(mlp, "shared_experts"):
        _describe_dense(layer, f"{name}.shared_experts", mlp.shared_experts, config)


def _describe_dense(layer: _runtime.Layer, name: str, mlp: Any, config: Any) -> None:
    _check_activation(config, name, mlp)
    if hasattr(mlp, "gate_up_proj"):
        rows = mlp.gate_up_proj.weight.shape[0] // 2
        layer.gate = linear(f"{name}.gate_up_proj", mlp.gate_up_proj, first=0, rows=rows)
        layer.up = linear(f"{name}.gate_up_proj", mlp.gate_up_proj, first=rows, rows=rows)
    else:
        layer.gate = linear(*_part(name, mlp, "gate_proj", "w1", "fc1", "c_fc"))
        if hasattr(mlp, "up_proj") or hasattr(mlp, "w3"):
            layer.up = linear(*_part(name, mlp, "up_proj", "w3"))
    layer.down = linear(*_part(name, mlp, "down_proj", "w2", "fc2", "c_proj"))


def _experts(name: str, mlp: Any) -> _runtime.Experts:
    described, experts = _runtime.Experts(), mlp.experts
    router_name, router = _part(name, mlp, "gate", "router")
    described.router = _rows(router_name, router)
    described.chosen, described.normalised = router.top_k, getattr(router, "norm_topk_prob", True)
    if hasattr(router, "e_score_correction_bias"):  # DeepSeek-V3
        described.sigmoid, described.correction = True, router.e_score_correction_bias
        described.groups, described.kept_groups = router.num_group, router.topk_group
        described.scale = router.routed_scaling_factor
    described.gate_up = _expert_linear(f"{name}.experts", experts, "gate_up_proj")
    described.down = _expert_linear(f"{name}.experts", experts, "down_proj")
    described.in_turn = not experts.is_concatenated
    return described


def _expert_linear(name: str, experts: Any, part: str) -> _runtime.ExpertLinear:
    bias = getattr(experts, f"{part}_bias", None)
    return _runtime.ExpertLinear(
        f"{name}.{part}",
        plain_weight(f"{name}.{part}", getattr(experts, part)),
        None if bias is None else plain_weight(f"{name}.{part}_bias", bias),
        experts.is_transposed,
    )


def _check_activation(config: Any, name: str, mlp: Any) -> None:
    part = next((part for part in ("act_fn", "activation_fn", "act") if hasattr(mlp, part)), None)
    if part is None:
        return
    setting = "hidden_activation" if getattr(config, "hidden_activation", None) else "hidden_act"
    kind, value = type(getattr(mlp, part)), getattr(config, setting)
    if kind is not type(ACT2FN[value]):
        raise ValueError(f"{name}.{part} is a {kind.__name__}; model.config.{setting} is {value!r}")
