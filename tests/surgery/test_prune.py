import copy
import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import NUM_LAYERS, TINY_CONFIGS, WINDOW, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM, LlamaConfig

from e3pruner.compat import CACHE
from e3pruner.models import find_layers, skipped
from e3pruner.surgery import PruningPlan, prune
from e3pruner.surgery.config import pruned_config
from e3pruner.surgery.parity import assert_parity

KEPT, REMOVED = [1, 3, 4], [0, 2, 5]
LENGTH = 3 * WINDOW


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, use_cache=False, **options).logits


@torch.no_grad()
def decoded(model, ids):
    """Logits of one token after another, each but the first through the cache."""
    outputs = [model(ids[:, :1], use_cache=True)]
    for step in range(1, ids.shape[1]):
        cache = outputs[-1][CACHE]
        outputs.append(model(ids[:, step : step + 1], use_cache=True, **{CACHE: cache}))
    return torch.cat([output.logits for output in outputs], dim=1)


def reloaded(model, path, **options):
    model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **options)


@pytest.mark.parametrize("model_type", [*TINY_CONFIGS, "gpt_neo", "ernie4_5_moe", "llama4_text", "qwen2_moe"])
def test_every_type_is_pruned_exactly(model_type, tmp_path):
    model, ids = tiny_model(model_type), tiny_tokens(length=LENGTH)
    dense, settings_before = logits(model, ids), model.config.to_dict()
    pruned = prune(model, PruningPlan.of_removed(REMOVED, NUM_LAYERS, model_type=model.config.model_type))

    with skipped(model, REMOVED):
        expected = logits(model, ids)
    assert torch.equal(logits(pruned, ids), expected)
    assert not torch.allclose(expected, dense, rtol=0.1)
    torch.testing.assert_close(decoded(pruned, ids), expected, rtol=1e-4, atol=1e-4)

    assert type(pruned) is type(model)
    assert len(find_layers(pruned)) == pruned.config.num_hidden_layers == len(KEPT)
    for position, layer in enumerate(find_layers(pruned)):
        names = ("layer_idx", "layer_id")
        indices = {getattr(module, name) for module in layer.modules() for name in names if hasattr(module, name)}
        assert indices - {None} == {position}
    for name, value in vars(model.config).items():
        if isinstance(value, list) and len(value) == NUM_LAYERS:
            assert getattr(pruned.config, name) == [value[layer] for layer in KEPT]

    copy_from_disk = reloaded(pruned, tmp_path)
    assert torch.equal(logits(copy_from_disk, ids), expected)
    prompt = ids[:, :WINDOW]
    greedy = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    written = pruned.generate(prompt, **greedy)
    assert written.shape == (2, 3 * WINDOW)
    assert torch.equal(pruned.generate(prompt, **greedy, use_cache=False), written)
    copy_from_disk.generation_config.eos_token_id = None
    assert torch.equal(copy_from_disk.generate(prompt, **greedy), written)

    assert torch.equal(logits(model, ids), dense)
    assert model.config.to_dict() == settings_before


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("falcon", {"alibi": False, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}),
        (
            "falcon",
            {
                "alibi": False,
                "new_decoder_architecture": False,
                "multi_query": False,
                "parallel_attn": False,
                "num_kv_heads": 4,
            },
        ),
        ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
        ("stablelm", {"use_parallel_residual": True}),
        ("llama", {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 2, "final_logit_softcapping": 3.0}),
        ("deepseek_v3", {"q_lora_rank": None, "first_k_dense_replace": 0}),
    ],
)
def test_variants_of_a_type_are_pruned_exactly(model_type, changes, tmp_path):
    model, ids = tiny_model(model_type, **changes), tiny_tokens(length=LENGTH)
    pruned = prune(model, KEPT)
    with skipped(model, REMOVED):
        expected = logits(model, ids)
    assert torch.equal(logits(pruned, ids), expected)
    assert torch.equal(logits(reloaded(pruned, tmp_path), ids), expected)


def test_the_folder_loads_where_our_packages_were_never_imported(tmp_path):
    ids, expected = tiny_tokens(length=LENGTH), {}
    for model_type in ("smollm3", "bloom", "deepseek_v3"):
        pruned = prune(tiny_model(model_type), KEPT)
        pruned.save_pretrained(tmp_path / model_type)
        expected[model_type] = logits(pruned, ids)
    script = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
for name in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", attn_implementation="eager")
    with torch.no_grad():
        save_file({"logits": model(ids, use_cache=False).logits}, f"{folder}/{name}.safetensors")
assert not {"e3pruner", "e3kernels"} & sys.modules.keys()
"""
    arguments = [str(tmp_path), json.dumps(ids.tolist()), *expected]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, timeout=120)
    for model_type, values in expected.items():
        assert torch.equal(load_file(tmp_path / f"{model_type}.safetensors")["logits"], values)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "smollm3"])
@settings(max_examples=8, deadline=None)
@given(kept=st.sets(st.integers(0, NUM_LAYERS - 1), min_size=1))
def test_any_set_of_layers_can_stay(model_type, kept):
    model, ids = tiny_model(model_type), tiny_tokens(length=LENGTH)
    pruned = prune(model, sorted(kept))
    with skipped(model, set(range(NUM_LAYERS)) - kept):
        assert torch.equal(logits(pruned, ids), logits(model, ids))


@pytest.mark.parametrize(
    ("model_type", "before", "after"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 3}, {"first_k_dense_replace": 1}),
        (
            "qwen3_moe",  # dense before: 0, 2, 3, 4
            {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
            {"decoder_sparse_step": 1, "mlp_only_layers": [1, 2]},
        ),
        ("qwen2", {"max_window_layers": 2}, {"max_window_layers": 1}),
        ("gpt2", {"n_layer": 6}, {"n_layer": 3, "num_hidden_layers": 3}),
    ],
)
def test_indices_are_renumbered(model_type, before, after):
    config = tiny_model(model_type).config
    pruned = pruned_config(config, KEPT)
    for name, value in before.items():
        assert getattr(config, name) == value
    for name, value in after.items():
        assert getattr(pruned, name) == value


def test_a_list_generated_from_a_pattern_is_sliced_not_generated_anew():
    config = tiny_model("gemma3_text", layer_types=None, sliding_window_pattern=3).config
    assert config.layer_types == (["sliding_attention"] * 2 + ["full_attention"]) * 2
    assert pruned_config(config, [1, 2, 5]).layer_types == ["sliding_attention", "full_attention", "full_attention"]


@pytest.mark.parametrize("kept", [[1, 2], [0, 3, 4]])  # full attention only, sliding only
def test_one_kind_of_layer_may_remain_alone(kept, tmp_path):
    pruned, ids = prune(tiny_model("gemma3_text"), kept), tiny_tokens(length=LENGTH)
    assert torch.equal(logits(reloaded(pruned, tmp_path), ids), logits(pruned, ids))


def test_settings_of_single_layers_move_with_them():
    single = {2: {"intermediate_size": 20}, 3: {"intermediate_size": 40}}
    config = pruned_config(LlamaConfig(num_hidden_layers=6, per_layer_config=single), KEPT)
    assert [layer.intermediate_size for layer in config.per_layer_config] == [11008, 40, 11008]
    assert not pruned_config(config, [0, 2]).is_heterogeneous


def test_settings_unknown_to_us_are_refused_by_the_proof(monkeypatch):
    monkeypatch.setattr("e3pruner.surgery.config.check_kept", lambda config, kept: None)
    with pytest.raises(ValueError, match=r"layer 1 cannot become layer 0: .* attn: scaling from .* to"):
        prune(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True), KEPT)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        (
            "layer_types",
            ["full_attention"] * 3,
            "layer 3 cannot become layer 1: .* from 'sliding_attention' to 'full_attention'",
        ),
        ("no_rope_layers", [1, 1, 1], "layer 1 cannot become layer 0: .* self_attn: use_rope from 0 to 1"),
    ],
)
def test_a_list_left_unsliced_fails_the_proof(monkeypatch, setting, value, message):
    def careless(config, kept):
        pruned = pruned_config(config, kept)
        setattr(pruned, setting, value)
        return pruned

    monkeypatch.setattr("e3pruner.surgery.in_memory.pruned_config", careless)
    with pytest.raises(ValueError, match=message):
        prune(tiny_model("smollm3" if setting == "no_rope_layers" else "qwen3"), KEPT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral"])
@pytest.mark.filterwarnings("ignore:model was cast")
def test_the_proof_sees_other_layers_and_a_cache_at_the_wrong_position(model_type, dtype):
    model = tiny_model(model_type).to(dtype)
    pruned = prune(model, [1, 3, 5])
    with pytest.raises(ValueError, match="logits differ by"):
        assert_parity(model, pruned, [2, 4, 5])  # of the same kinds
    whole = pruned.forward

    def at_position_zero(**inputs):
        late = {"position_ids": torch.zeros_like(inputs["input_ids"])} if CACHE in inputs else {}
        return whole(**inputs, **late)

    pruned.forward = at_position_zero
    with pytest.raises(ValueError, match="decoding with a cache changes its logits by"):
        assert_parity(model, pruned, [1, 3, 5])


def test_the_proof_sees_the_index_of_another_layer():
    model = tiny_model("llama")
    pruned = prune(model, KEPT)
    find_layers(pruned)[1].self_attn.layer_idx = 0
    with pytest.raises(ValueError, match=r"layer 1 \(self_attn\) bears the index of another layer"):
        assert_parity(model, pruned, KEPT)


def test_weights_are_the_models_own_copy_unless_shared():
    model, ids = tiny_model("llama"), tiny_tokens()
    before = copy.deepcopy(model.state_dict())
    pruned = prune(model, KEPT)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    with torch.no_grad():
        for parameter in pruned.parameters():
            assert parameter.requires_grad
            parameter.zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])

    shared = prune(model, KEPT, copy_weights=False)
    assert shared.lm_head.weight is shared.model.embed_tokens.weight
    for new, old in zip(find_layers(shared), (find_layers(model)[layer] for layer in KEPT), strict=True):
        assert new.mlp.up_proj.weight.data_ptr() == old.mlp.up_proj.weight.data_ptr()
    with skipped(model, REMOVED):
        assert torch.equal(logits(shared, ids), logits(model, ids))


def test_bfloat16_loaded_as_such_stays_exact(tmp_path):
    model = reloaded(tiny_model("llama"), tmp_path / "dense", dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = prune(model, KEPT)
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}
    again, ids = reloaded(pruned, tmp_path / "pruned"), tiny_tokens()
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again, ids), logits(pruned, ids))


def test_a_model_cast_after_loading_is_pruned_with_a_warning():
    model, ids = tiny_model("llama").bfloat16(), tiny_tokens()
    with pytest.warns(UserWarning, match=r"model was cast after loading, model\.rotary_emb\.inv_freq"):
        pruned = prune(model, KEPT)
    with skipped(model, REMOVED):
        assert torch.equal(logits(pruned, ids), logits(model, ids))


def test_mode_attention_and_generation_settings_are_kept():
    model = tiny_model("gpt2").train()
    model.generation_config.temperature = 0.3
    model.set_attn_implementation("sdpa")
    pruned = prune(model, KEPT)
    assert pruned.training
    assert pruned.config._attn_implementation == "sdpa"
    assert pruned.generation_config == model.generation_config
    assert pruned.generation_config is not model.generation_config


def test_a_plan_is_anything_with_kept_or_the_kept_layers():
    model, ids = tiny_model("gpt2"), tiny_tokens()
    expected = logits(prune(model, KEPT), ids)
    for plan in (tuple(KEPT), SimpleNamespace(kept=KEPT), PruningPlan(KEPT, REMOVED)):
        assert torch.equal(logits(prune(model, plan), ids), expected)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([0, 6], "kept holds 6; a layer index is an integer from 0 to 5"),
        ([-1, 2], "kept holds -1"),
        ([1, 1], r"kept=\[1, 1\] names a layer twice"),
        ([], "kept=.* keeps no layer"),
        (PruningPlan([0], [1]), "plan is for 2 layers, model has 6"),
        (PruningPlan(KEPT, REMOVED, model_type="llama"), "plan is for a llama model, model is gpt2"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        prune(tiny_model("gpt2"), plan)


def test_weights_that_are_not_in_memory_are_refused():
    with pytest.raises(ValueError, match="model has weights on meta; load it on one device"):
        prune(tiny_model("gpt2").to("meta"), KEPT)
