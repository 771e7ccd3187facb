"""Families whose layers do more than Llama's: experts, latent attention, convolutions, sinks, parallel blocks."""

import copy

import pytest
import torch
from runtime.test_runtime import LENGTH, assert_close, expected_logits, runtime_logits, supported_model
from tiny_models import NUM_LAYERS, VOCAB_SIZE, tiny_tokens

pytest.importorskip("e3kernels._runtime", reason="e3kernels._runtime is not built: python -m e3kernels.info says why")

from e3kernels import _runtime
from e3pruner.runtime.layer_skip import LayerSkipRuntime
from e3pruner.surgery import prune

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "phi", "stablelm", "starcoder2", "cohere2", "glm4", "gemma4_text"]
FAMILIES += ["deepseek_v3", "lfm2"]
KEEP = [0, 1, 4, 5]
OUTPUTS = {"attention": ("o_proj", "dense", "out_proj"), "mlp": ("down_proj", "fc2", "w2")}
SMALL_GEMMA = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": VOCAB_SIZE}
KINDS = {  # of one fact each: another value than the tiny configuration's
    "qwen3_moe": {"norm_topk_prob": True},
    "stablelm": {"use_parallel_residual": True},
    "phi": {"qk_layernorm": False},
    "gemma4_text": {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "attention_bias": True},
    "gemma4_text, as small ones are": SMALL_GEMMA | {"use_double_wide_mlp": True},
    "deepseek_v3": {
        "q_lora_rank": None,
        "norm_topk_prob": False,
        "rope_interleave": False,
        "n_group": 4,
        "topk_group": 2,
    },
    "lfm2": {"conv_L_cache": 5, "conv_bias": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_setting_of_the_family(kind):
    model, ids = supported_model(kind.partition(",")[0], **KINDS[kind]), tiny_tokens(length=LENGTH)
    runtime, expected = LayerSkipRuntime(model), expected_logits(model, ids)
    for chunk in (1, 3, LENGTH):
        assert_close(runtime_logits(runtime, ids, chunk), expected, 2e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_text_and_follow_ups_of_the_kept_layers_are_those_of_the_pruned_model(model_type):
    model, prompt = supported_model(model_type), tiny_tokens(batch=1, length=LENGTH)
    runtime, pruned = LayerSkipRuntime(model, KEEP), prune(model, KEEP)
    greedy = {"max_new_tokens": 10, "do_sample": False}
    text = pruned.generate(prompt, **greedy)
    assert torch.equal(runtime.generate(prompt, max_new_tokens=10), text)
    assert torch.equal(model.generate(prompt, custom_generate=runtime, **greedy), text)
    follow_up = torch.cat([text, tiny_tokens(batch=1, length=LENGTH, seed=1)], dim=1)
    cache = runtime.new_cache(1)
    parts = [runtime.append(cache, part, part.shape[1]) for part in follow_up.split([LENGTH, 1, 3, 9, 17], dim=1)]
    assert_close(torch.cat(parts, dim=1), expected_logits(pruned, follow_up), 2e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_bf16_is_closer_to_fp32_than_hugging_face(model_type):
    model, ids = supported_model(model_type).to(torch.bfloat16), tiny_tokens(length=LENGTH)
    wide = copy.deepcopy(model).float()
    if model_type == "gemma4_text":  # the scale of the embeddings is rounded to the weights' dtype
        wide.model.embed_tokens.embed_scale = model.model.embed_tokens.embed_scale.to(torch.bfloat16).float()
    exact, runtime = expected_logits(wide, ids), LayerSkipRuntime(model)
    naive = (expected_logits(model, ids) - exact).abs()
    for chunk in (1, LENGTH):
        error = (runtime_logits(runtime, ids, chunk) - exact).abs()
        assert error.mean() <= naive.mean() * (1.0 if chunk == 1 else 1.5)
    text = runtime.generate(ids, max_new_tokens=10)
    along = expected_logits(wide, text)[:, LENGTH - 1 : -1]
    chosen = along.gather(-1, text[:, LENGTH:, None]).squeeze(-1)
    assert (along.amax(-1) - chosen <= 2 * naive.max()).all()  # where both round, the best may be another


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_token_has_the_same_bits_alone_and_among_others(model_type, dtype):
    model, ids = supported_model(model_type).to(dtype), tiny_tokens(length=16, batch=1)
    runtime = LayerSkipRuntime(model)
    alone = runtime_logits(runtime, ids, 1)
    for chunk in (3, 16):
        assert torch.equal(runtime_logits(runtime, ids, chunk), alone)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_threads_and_instruction_sets_change_the_rounding_only(model_type, monkeypatch):
    model, ids = supported_model(model_type), tiny_tokens(length=LENGTH)
    expected = expected_logits(model, ids)
    torch.set_num_threads(3)
    assert_close(runtime_logits(LayerSkipRuntime(model), ids[:, :6], 2), expected[:, :6], 2e-5)
    torch.set_num_threads(1)
    for isa in _runtime.instruction_sets():
        monkeypatch.setenv("E3_ISA", isa)
        assert_close(runtime_logits(LayerSkipRuntime(model), ids, 4), expected, 2e-5)


@pytest.mark.parametrize("model_type", ["phi", "cohere2", "mixtral", "lfm2", "deepseek_v3"])
def test_attention_and_mlp_are_skipped_separately(model_type):
    model, ids = supported_model(model_type), tiny_tokens(length=LENGTH)
    keep = {"attention": [0, 2, 3], "mlp": [1, 2, 4, 5]}
    gutted = copy.deepcopy(model)
    with torch.no_grad():
        for index, layer in enumerate(gutted.model.layers):
            for block, matrices in OUTPUTS.items():
                for name, parameter in layer.named_parameters():
                    if index not in keep[block] and any(part in name for part in matrices):
                        parameter.zero_()
    runtime, expected = LayerSkipRuntime(model, keep), expected_logits(gutted, ids)
    for chunk in (1, LENGTH):
        assert_close(runtime_logits(runtime, ids, chunk), expected, 2e-5)


def test_a_step_counts_the_bytes_of_the_experts_that_a_token_is_routed_to():
    model = supported_model("mixtral")
    runtime, mlp = LayerSkipRuntime(model), model.model.layers[0].mlp
    before = runtime.weight_bytes
    runtime.keep = {"attention": list(range(NUM_LAYERS)), "mlp": list(range(1, NUM_LAYERS))}
    expert = mlp.experts.gate_up_proj[0].nbytes + mlp.experts.down_proj[0].nbytes
    assert before - runtime.weight_bytes == mlp.gate.weight.nbytes + 2 * expert


def test_a_latent_cache_holds_the_latent_and_a_convolution_its_input():
    bytes_of = {kind: LayerSkipRuntime(supported_model(kind)).new_cache(3, capacity=64).bytes for kind in FAMILIES}
    assert bytes_of["deepseek_v3"] == NUM_LAYERS * 3 * 64 * (16 + 8) * 4
    assert bytes_of["lfm2"] == 3 * 64 * 4 * (4 * 32 + 2 * 2 * 2 * 8)


def test_experts_beside_an_mlp_with_norms_of_their_own_are_refused_by_name():
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24, "enable_moe_block": True}
    with pytest.raises(ValueError, match=r"model.config.enable_moe_block is True"):
        LayerSkipRuntime(supported_model("gemma4_text", **experts))


def test_layers_that_read_anothers_keys_stay_with_it():
    model, ids = supported_model("gemma4_text", **SMALL_GEMMA), tiny_tokens(length=LENGTH)
    runtime = LayerSkipRuntime(model)  # layers 4 and 5 read what 3 and 2 wrote
    with pytest.raises(ValueError, match="keep has layer 5, which reads the keys of layer 2"):
        runtime.keep = [0, 1, 3, 5]
    own = runtime.new_cache(1).bytes
    runtime.keep = [0, 2, 3, 4, 5]
    assert_close(runtime_logits(runtime, ids, 3), expected_logits(prune(model, runtime.keep), ids), 2e-5)
    runtime.keep = [1, 2, 3]
    assert runtime.new_cache(1).bytes < own


def test_a_router_and_its_corrections_are_watched():
    model = supported_model("deepseek_v3")
    runtime, gate = LayerSkipRuntime(model), model.model.layers[4].mlp.gate
    gate.e_score_correction_bias[0] += 1.0
    with pytest.raises(RuntimeError, match=r"layers.4.mlp.gate.e_score_correction_bias has other values"):
        runtime.generate(tiny_tokens(), max_new_tokens=1)
    gate.e_score_correction_bias[0] -= 1.0
    gate.top_k = 1
    with pytest.raises(RuntimeError, match=r"layers.4.mlp.gate.top_k was 2"):
        runtime.generate(tiny_tokens(), max_new_tokens=1)
