"""A model that was changed after its runtime was built: noticed and refused, or followed; never decoded as it was."""

import copy
import types

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens
from torch import nn
from torch.nn.utils import parametrizations

pytest.importorskip("e3kernels._runtime", reason="e3kernels._runtime is not built: python -m e3kernels.info says why")

from e3pruner.models import find_layers
from e3pruner.models.gates import gated, skipped
from e3pruner.runtime import LayerSkipRuntime

NEW = 6

pytestmark = pytest.mark.usefixtures("one_thread")


def hugging_face(model, ids, **options):
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(ids, **options)


# The ways into a runtime that read weights.
ENTRIES = {
    "generate": lambda runtime, ids: runtime.generate(ids, max_new_tokens=NEW),
    "draft": lambda runtime, ids: runtime.generate(ids, max_new_tokens=NEW, draft_keep=[0, 1]),
    "hook": lambda runtime, ids: hugging_face(runtime.model, ids, custom_generate=runtime),
    "cache": lambda runtime, ids: runtime.new_cache(1),
}


def swap_mlp(model):
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[1].mlp)


def swap_layers(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def delete_layers(model):
    del model.model.layers[3:]
    model.config.num_hidden_layers = 3


def append_layer(model):
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.config.num_hidden_layers += 1


def leave_layers_out(model):
    model.config.num_hidden_layers = 3


def share_a_layer(model):
    model.model.layers[1] = model.model.layers[0]


def patch_layer(model):
    model.model.layers[2].forward = lambda hidden_states, *args, **kwargs: hidden_states


def patch_linear(model):
    linear = model.model.layers[2].mlp.up_proj
    linear.forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight) * 2, linear)


def change_class(model):
    mlp = model.model.layers[2].mlp
    mlp.__class__ = type("LlamaMLP", (type(mlp),), {"forward": lambda self, x: x})


def add_hook(model):
    model.model.layers[1].register_forward_hook(lambda *_: None)


def add_pre_hook(model):
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def replace_parameter(model):
    linear = model.model.layers[2].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


def add_bias(model):
    linear = model.model.layers[2].mlp.up_proj
    linear.register_parameter("bias_of_mine", nn.Parameter(torch.ones(linear.out_features)))


def replace_data(model):
    weight = model.model.layers[2].mlp.up_proj.weight
    weight.data = weight.data * 2


def transpose_data(model):
    weight = model.model.layers[2].self_attn.o_proj.weight
    weight.data = weight.data.t()


def add_lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    model.eval()


def parametrize(model):
    parametrizations.weight_norm(model.model.layers[2].mlp.up_proj)


def to_bfloat16(model):
    model.to(torch.bfloat16)


def to_meta(model):
    model.model.layers[2].to("meta")


def untie_head(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * -1)


def resize_vocabulary(model):
    model.resize_token_embeddings(120)


def train(model):
    model.train()


def scale_attention(model):
    model.model.layers[2].self_attn.scaling *= 2


def change_norm(model):
    model.model.norm.variance_epsilon = 0.5


def change_rotary(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def change_original_rotary(model):
    model.model.rotary_emb.original_inv_freq.mul_(0.5)


def release_storage(model):
    model.model.layers[2].mlp.up_proj.weight.untyped_storage().resize_(0)


def release_embedding(model):
    model.model.embed_tokens.weight.untyped_storage().resize_(0)


MUTATIONS = [
    (swap_mlp, r"model\.layers\.0\.mlp was replaced"),
    (swap_layers, r"model\.layers\.0 was replaced"),
    (delete_layers, r"model\.layers\.3 was removed"),
    (append_layer, r"model\.layers\.6 was added"),
    (leave_layers_out, "num_hidden_layers was 6 .* and is now 3"),
    (share_a_layer, r"model\.layers\.1 was replaced"),
    (patch_layer, r"model\.layers\.2 has a forward of its own"),
    (patch_linear, r"model\.layers\.2\.mlp\.up_proj has a forward of its own"),
    (change_class, r"model\.layers\.2\.mlp was a LlamaMLP"),
    (add_hook, r"model\.layers\.1 has a forward hook"),
    (add_pre_hook, r"model\.layers\.1\.mlp has a forward hook"),
    (replace_parameter, r"model\.layers\.2\.mlp\.up_proj\.weight was replaced"),
    (add_bias, r"model\.layers\.2\.mlp\.up_proj\.bias_of_mine was added"),
    (replace_data, r"model\.layers\.2\.mlp\.up_proj\.weight was .* at another address"),
    (transpose_data, r"model\.layers\.2\.self_attn\.o_proj\.weight was .* at another address"),
    (add_lora, r"model\.layers\.0\.self_attn\.q_proj was replaced"),
    (parametrize, r"model\.layers\.2\.mlp\.up_proj\.parametrizations was added"),
    (to_bfloat16, "is now BFloat16"),
    (to_meta, r"model\.layers\.2\..* was replaced"),
    (untie_head, r"lm_head\.weight was replaced"),
    (resize_vocabulary, r"model\.embed_tokens\.weight was .* at another address"),
    (train, "training mode"),
    (scale_attention, r"model\.layers\.2\.self_attn\.scaling was"),
    (change_norm, r"model\.norm\.variance_epsilon was"),
    (change_rotary, r"model\.rotary_emb\.inv_freq has other values"),
    (change_original_rotary, r"model\.rotary_emb\.original_inv_freq has other values"),
    (release_storage, r"model\.layers\.2\.mlp\.up_proj\.weight has lost its memory"),
    (release_embedding, r"model\.embed_tokens\.weight has lost its memory"),
]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("change", "message"), MUTATIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_changed_model_is_refused(change, message, entry):
    model, ids = tiny_model("llama"), tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(model)
    ENTRIES[entry](runtime, ids)
    change(model)
    with pytest.raises(RuntimeError, match=message):
        ENTRIES[entry](runtime, ids)


@pytest.mark.parametrize(
    ("model_type", "setting", "value"),
    [
        ("gemma2", "final_logit_softcapping", None),
        ("gemma2", "sliding_window", 6),
        ("gemma2", "layer_types", ["full_attention"] * 6),
        ("mistral", "sliding_window", None),
        ("granite", "logits_scaling", 1.0),
    ],
)
def test_a_setting_that_the_forward_pass_reads_is_watched(model_type, setting, value):
    model, ids = tiny_model(model_type), tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(model)
    setattr(model.config, setting, value)
    with pytest.raises(RuntimeError, match=f"{setting} was .* and is now"):
        runtime.generate(ids, max_new_tokens=1)
    new = LayerSkipRuntime(model).generate(ids, max_new_tokens=NEW)
    assert torch.equal(new, hugging_face(model, ids))


@pytest.mark.parametrize(
    ("model_type", "module", "attribute"),
    [
        ("granite", "model.layers.1", "residual_multiplier"),
        ("granite", "model", "embedding_multiplier"),
        ("gemma2", "model.layers.1.self_attn", "attn_logit_softcapping"),
        ("gemma2", "model.layers.1.input_layernorm", "eps"),
        ("llama", "model.rotary_emb", "attention_scaling"),
    ],
)
def test_a_number_that_a_module_keeps_is_watched(model_type, module, attribute):
    model, ids = tiny_model(model_type), tiny_tokens(batch=1, length=9)
    runtime, owner = LayerSkipRuntime(model), model.get_submodule(module)
    setattr(owner, attribute, getattr(owner, attribute) * 3)
    with pytest.raises(RuntimeError, match=f"{module}.{attribute} was"):
        runtime.generate(ids, max_new_tokens=1)


def test_the_scale_of_the_embeddings_is_watched():
    model, ids = tiny_model("gemma2"), tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(model)
    model.model.embed_tokens.embed_scale.mul_(2)
    with pytest.raises(RuntimeError, match=r"embed_tokens\.embed_scale has other values"):
        runtime.generate(ids, max_new_tokens=1)


@pytest.mark.parametrize("block", ["gated", "skipped"])
def test_a_gated_or_skipped_model_is_refused_and_free_again_after_it(block):
    model, ids = tiny_model("llama"), tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(model)
    context = gated(model, torch.zeros(6)) if block == "gated" else skipped(model, [1])
    with context, pytest.raises(RuntimeError, match="has a forward"):
        runtime.generate(ids, max_new_tokens=1)
    assert torch.equal(runtime.generate(ids, max_new_tokens=NEW), hugging_face(model, ids))


def merge_lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    assert peft.get_peft_model(model, config).merge_and_unload() is model
    model.eval()


def scale_weight(model):
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.mul_(-2)


def load_other_values(model):
    model.load_state_dict(tiny_model("llama", seed=5).state_dict())


@pytest.mark.parametrize("change", [merge_lora, scale_weight, load_other_values])
def test_values_that_change_in_place_are_followed(change):
    model, ids = tiny_model("llama"), tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(model)
    before = runtime.append(runtime.new_cache(1), ids)
    change(model)
    with torch.no_grad():
        expected = model(ids).logits[:, -1:]
    actual = runtime.append(runtime.new_cache(1), ids)
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert not torch.allclose(actual, before, rtol=1e-2)
    assert torch.equal(runtime.generate(ids, max_new_tokens=NEW), hugging_face(model, ids))


def test_memory_that_is_lost_between_two_steps_stops_the_request():
    model, ids = tiny_model("llama"), tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(model)
    for step in (ids, ids[:, :1]):  # by the generic path and by the kernels
        cache = runtime.new_cache(1)
        storage = model.model.layers[4].mlp.gate_proj.weight.untyped_storage()
        size, values = storage.nbytes(), storage.clone()
        storage.resize_(0)
        with pytest.raises(RuntimeError, match=r"model\.layers\.4\.mlp\.gate_proj\.weight has lost its memory"):
            runtime.append(cache, step)
        storage.resize_(size)
        storage.copy_(values)
        runtime = LayerSkipRuntime(model)  # the memory may be elsewhere now
        assert torch.isfinite(runtime.append(runtime.new_cache(1), step)).all()


def test_a_model_without_its_memory_is_not_taken():
    model = tiny_model("llama")
    release_storage(model)
    with pytest.raises(RuntimeError, match=r"model\.layers\.2\.mlp\.up_proj\.weight has lost its memory"):
        LayerSkipRuntime(model)


@pytest.mark.parametrize("count", [3, 7])
def test_a_configuration_that_contradicts_the_layers_is_refused(count):
    model = tiny_model("llama")
    model.config.num_hidden_layers = count
    with pytest.raises(ValueError, match=f"num_hidden_layers is {count}; model.layers holds 6"):
        LayerSkipRuntime(model)
    with pytest.raises(ValueError, match=f"{count} decoder layers"):
        find_layers(model)


def other_mlp(model):
    class OtherMLP(type(model.model.layers[0].mlp)):
        pass

    model.model.layers[0].mlp.__class__ = OtherMLP


def other_attention(model):
    model.model.layers[0].self_attn.__class__ = type(tiny_model("mistral").model.layers[0].self_attn)


def other_activation(model):
    model.model.layers[0].mlp.act_fn = nn.ReLU()


def other_heads(model):
    model.config.num_attention_heads = 2


def other_key_value_heads(model):
    model.config.num_key_value_heads = 4


def narrow_mlp(model):
    mlp = model.model.layers[0].mlp
    mlp.down_proj = nn.Linear(24, 32)


def short_norm(model):
    model.model.norm.weight = nn.Parameter(torch.ones(16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (patch_layer, r"model\.layers\.2 has a forward of its own"),
        (patch_linear, r"model\.layers\.2\.mlp\.up_proj has a forward of its own"),
        (add_hook, r"model\.layers\.1 has a forward hook"),
        (add_lora, r"model\.layers\.0\.self_attn\.q_proj is a Linear of peft"),
        (parametrize, r"model\.layers\.2\.mlp\.up_proj is a ParametrizedLinear"),
        (other_mlp, r"model\.layers\.0\.mlp is a OtherMLP"),
        (other_attention, r"model\.layers\.0\.self_attn is a MistralAttention"),
        (other_activation, r"model\.layers\.0\.mlp\.act_fn is a ReLU; model\.config\.hidden_act is 'silu'"),
        (other_heads, r"model\.layers\.0\.self_attn\.q_proj\.weight has shape"),
        (other_key_value_heads, r"model\.layers\.0\.self_attn\.k_proj\.weight has shape"),
        (narrow_mlp, r"model\.layers\.0\.mlp\.down_proj\.weight has shape"),
        (short_norm, r"model\.norm\.weight has 16 elements"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_that_was_changed_before_is_refused(change, message):
    model = tiny_model("llama")
    change(model)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        LayerSkipRuntime(model)


def test_a_class_whose_forward_was_patched_is_refused(monkeypatch):
    model, ids = tiny_model("llama"), tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(model)
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: x)
    with pytest.raises(RuntimeError, match="the forward of LlamaMLP was replaced"):
        runtime.generate(ids, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"the forward of LlamaMLP is from .*test_runtime_changes"):
        LayerSkipRuntime(model)


def test_hooks_for_all_modules_are_refused():
    model, ids = tiny_model("llama"), tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(RuntimeError, match="forward hook for all modules"):
            runtime.generate(ids, max_new_tokens=1)
    finally:
        handle.remove()
    assert runtime.generate(ids, max_new_tokens=1).shape == (1, 10)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_what_transformers_leaves_on_a_model_is_no_change(model_type):
    """Recording hidden states leaves hooks for good, other settings do not reach the forward pass."""
    model, ids = tiny_model(model_type), tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(model)
    model(ids, output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation("sdpa")
    model.config.use_cache = False
    model.config.return_dict = False
    model.gradient_checkpointing_enable()
    assert torch.equal(
        runtime.generate(ids, max_new_tokens=NEW), LayerSkipRuntime(model).generate(ids, max_new_tokens=NEW)
    )
