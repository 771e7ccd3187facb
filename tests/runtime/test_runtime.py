"""The compiled runtime against Hugging Face: logits, masks of layers, caches, refusals."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import EXTRA_CONFIGS, NUM_LAYERS, TINY_CONFIGS, VOCAB_SIZE, tiny_model, tiny_tokens
from torch import nn
from transformers import AutoModelForCausalLM

pytest.importorskip("e3kernels._runtime", reason="e3kernels._runtime is not built: python -m e3kernels.info says why")

from e3kernels import _runtime
from e3pruner.runtime.decoder_description import SUPPORTED
from e3pruner.runtime.layer_skip import LayerSkipRuntime
from e3pruner.surgery import prune

LENGTH = 20  # beyond the fused path's 16 tokens, and several windows
MORE_SETTINGS = {
    "llama": {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
        | {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    },
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "gemma": {"head_dim": 20, "hidden_size": 44},  # no multiple of any vector width
    "gemma4_text": {"num_kv_shared_layers": 0, "global_head_dim": 32, "final_logit_softcapping": 5.0},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def supported_model(model_type, **changes):
    model = tiny_model(model_type, **MORE_SETTINGS.get(model_type, {}) | changes)
    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "layer_scalar")):  # no parameters, and 0 and 1 when they are made
            buffer += 0.2 * torch.randn(buffer.shape, generator=generator)
    return model


@torch.no_grad()
def expected_logits(model, ids, **options):
    return model(ids, use_cache=False, **options).logits.float()


def runtime_logits(runtime, ids, chunk, attention_mask=None):
    """All logits, `chunk` tokens at a time through the cache."""
    cache = runtime.new_cache(ids.shape[0], attention_mask)
    parts = [runtime.append(cache, part, part.shape[1]) for part in ids.split(chunk, dim=1)]
    return torch.cat(parts, dim=1)


def assert_close(actual, expected, relative=1e-4):
    assert torch.isfinite(actual).all()
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


def test_every_supported_type_has_a_tiny_model():
    assert set(SUPPORTED) <= set(TINY_CONFIGS | EXTRA_CONFIGS)


@pytest.mark.parametrize("chunk", [1, 3, LENGTH])
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_logits_are_those_of_hugging_face(model_type, chunk):
    model, ids = supported_model(model_type), tiny_tokens(length=LENGTH)
    actual = runtime_logits(LayerSkipRuntime(model), ids, chunk)
    assert_close(actual, expected_logits(model, ids), 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2"])
def test_half_precision_is_closer_to_fp32_than_hugging_face(model_type, dtype):
    model, ids = supported_model(model_type).to(dtype), tiny_tokens(length=LENGTH)
    exact = expected_logits(copy.deepcopy(model).float(), ids)
    if model_type == "gemma2":  # the scale of the embeddings is rounded to the weights' dtype
        exact_model = copy.deepcopy(model).float()
        exact_model.model.embed_tokens.embed_scale = model.model.embed_tokens.embed_scale.to(dtype).float()
        exact = expected_logits(exact_model, ids)
    error = (runtime_logits(LayerSkipRuntime(model), ids, 1) - exact).abs().max()
    naive_error = (expected_logits(model, ids) - exact).abs().max()
    assert error <= naive_error


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_left_padding_changes_nothing(model_type):
    model, ids = supported_model(model_type), tiny_tokens(batch=1, length=12)
    runtime = LayerSkipRuntime(model)
    padding = 5
    padded = torch.cat([torch.full((1, padding), 7), ids], dim=1)
    batch = torch.cat([padded, tiny_tokens(batch=1, length=12 + padding, seed=1)])
    mask = torch.ones_like(batch)
    mask[0, :padding] = 0
    for chunk in (1, 3, batch.shape[1]):
        actual = runtime_logits(runtime, batch, chunk, mask)
        assert_close(actual[:1, padding:], expected_logits(model, ids), 2e-5)
        assert_close(actual[1:], expected_logits(model, batch[1:]), 2e-5)


@pytest.mark.parametrize("keep", [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [0, 4, 5], [1, 3], [2]])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "smollm3"])
def test_keep_gives_the_pruned_models_logits(model_type, keep):
    model, ids = supported_model(model_type), tiny_tokens(length=LENGTH)
    runtime = LayerSkipRuntime(model)
    runtime.keep = keep
    expected = expected_logits(prune(model, keep), ids)
    for chunk in (1, 4, LENGTH):
        assert_close(runtime_logits(runtime, ids, chunk), expected, 2e-5)
    assert runtime.keep == keep


class NoBranch(nn.Module):
    """Instead of an attention or MLP whose output is left out."""

    def __init__(self, is_attention):
        super().__init__()
        self.is_attention = is_attention

    def forward(self, hidden_states=None, *args, **kwargs):
        zeros = torch.zeros_like(hidden_states if hidden_states is not None else args[0])
        return (zeros, None) if self.is_attention else zeros


@settings(max_examples=12, deadline=None)
@given(attention=st.sets(st.integers(0, NUM_LAYERS - 1)), mlp=st.sets(st.integers(0, NUM_LAYERS - 1)))
def test_attention_and_mlp_are_skipped_separately(attention, mlp):
    if not attention | mlp:
        return
    model, ids = supported_model("qwen3"), tiny_tokens(length=LENGTH)
    runtime = LayerSkipRuntime(model, {"attention": sorted(attention), "mlp": sorted(mlp)})
    gutted = copy.deepcopy(model)
    for index, layer in enumerate(gutted.model.layers):
        if index not in attention:
            layer.self_attn = NoBranch(True)
        if index not in mlp:
            layer.mlp = NoBranch(False)
    expected = expected_logits(gutted, ids)
    for chunk in (1, LENGTH):
        assert_close(runtime_logits(runtime, ids, chunk), expected, 2e-5)


def test_only_kept_attention_layers_hold_keys_and_values():
    runtime = LayerSkipRuntime(supported_model("llama"))
    one_layer = 2 * 3 * 2 * 64 * 8 * 4  # keys and values, batch, heads, slots, head size, bytes
    assert runtime.new_cache(3, capacity=64).bytes == NUM_LAYERS * one_layer
    runtime.keep = [0, 5]
    assert runtime.new_cache(3, capacity=64).bytes == 2 * one_layer
    runtime.keep = {"attention": [1], "mlp": [1, 2, 3]}
    assert runtime.new_cache(3, capacity=64).bytes == one_layer


def test_requests_with_different_masks_run_side_by_side():
    model, ids = supported_model("llama"), tiny_tokens(length=LENGTH)
    runtime = LayerSkipRuntime(model)
    keeps = [[0, 1, 2, 3, 4, 5], [0, 2, 5], {"attention": [1], "mlp": [0, 1]}]
    expected = []
    caches = []
    for keep in keeps:
        runtime.keep = keep
        expected.append(runtime_logits(runtime, ids, 1))
        caches.append(runtime.new_cache(2))
    interleaved = [[] for _ in keeps]
    for step in range(LENGTH):
        for cache, parts in zip(caches, interleaved, strict=True):
            parts.append(runtime.append(cache, ids[:, step : step + 1]))
    for parts, alone in zip(interleaved, expected, strict=True):
        assert torch.equal(torch.cat(parts, dim=1), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_has_the_same_bits_alone_and_among_others(dtype):
    model, ids = supported_model("llama").to(dtype), tiny_tokens(length=16, batch=1)
    runtime = LayerSkipRuntime(model)
    alone = runtime_logits(runtime, ids, 1)
    for chunk in (2, 3, 5, 7, 16):
        assert torch.equal(runtime_logits(runtime, ids, chunk), alone)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(threads):
    model, ids = supported_model("gemma2"), tiny_tokens(length=LENGTH)
    expected = expected_logits(model, ids)
    torch.set_num_threads(threads)
    assert_close(runtime_logits(LayerSkipRuntime(model), ids, 1), expected, 2e-5)


@pytest.mark.parametrize("isa", _runtime.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set_of_this_machine(isa, dtype, monkeypatch):
    model, ids = supported_model("gemma").to(dtype), tiny_tokens(length=LENGTH)
    widest = runtime_logits(LayerSkipRuntime(model), ids, 1)
    monkeypatch.setenv("E3_ISA", isa)
    # Another order of summation can round a value that is stored in 16 bit the other way.
    relative = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert_close(runtime_logits(LayerSkipRuntime(model), ids, 3), widest, relative)


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("E3_ISA", "avx1024")
    with pytest.raises(ValueError, match="E3_ISA=avx1024"):
        LayerSkipRuntime(supported_model("llama"))


def test_weights_are_shared_not_copied():
    model, ids = supported_model("llama"), tiny_tokens(length=8)
    runtime = LayerSkipRuntime(model)
    before = runtime_logits(runtime, ids, 1)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.mul_(1.5)
    after = runtime_logits(runtime, ids, 1)
    assert not torch.equal(after, before)
    assert_close(after, expected_logits(model, ids), 2e-5)


def test_a_cache_outgrows_its_capacity():
    model, ids = supported_model("llama", max_position_embeddings=300), tiny_tokens(length=200, batch=1)
    assert_close(runtime_logits(LayerSkipRuntime(model), ids, 10), expected_logits(model, ids), 2e-5)


def test_truncating_a_cache_takes_tokens_back():
    model, ids = supported_model("mistral"), tiny_tokens(length=12)
    runtime = LayerSkipRuntime(model)
    cache = runtime.new_cache(2)
    runtime.append(cache, ids[:, :6])
    runtime.append(cache, tiny_tokens(length=5, seed=9))
    cache.truncate(6)
    actual = runtime.append(cache, ids[:, 6:], 6)
    assert_close(actual, expected_logits(model, ids)[:, 6:], 2e-5)
    with pytest.raises(ValueError, match="length is 13; the cache holds 12"):
        cache.truncate(13)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([], "keep is empty"),
        ({"attention": [], "mlp": []}, "keep is empty"),
        ([0, NUM_LAYERS], f"keep holds {NUM_LAYERS}"),
        ([-1], "keep holds -1"),
        ([1, 1], "names a layer twice"),
        ([0.5], "keep holds 0.5"),
        ({"attention": [0]}, "mapping has 'attention' and 'mlp'"),
    ],
)
def test_bad_keep_is_refused_and_the_old_one_stays(keep, message):
    runtime = LayerSkipRuntime(supported_model("llama"), keep=[0, 1])
    with pytest.raises(ValueError, match=message):
        runtime.keep = keep
    assert runtime.keep == [0, 1]


def test_keep_reads_back_as_it_was_set():
    runtime = LayerSkipRuntime(supported_model("llama"))
    assert runtime.keep == list(range(NUM_LAYERS))
    runtime.keep = {"attention": [2, 1], "mlp": [0]}
    assert runtime.keep == {"attention": [1, 2], "mlp": [0]}


@pytest.mark.parametrize("model_type", ["gpt2", "falcon", "gpt_neox", "qwen2_moe"])
def test_other_types_are_refused_by_name(model_type):
    model = tiny_model(model_type)
    with pytest.raises(ValueError, match=type(model).__name__):
        LayerSkipRuntime(model)


def test_a_subclass_is_refused():
    model = supported_model("llama")
    model.__class__ = type("LlamaForCausalLM", (type(model),), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        LayerSkipRuntime(model)


def test_replaced_weights_and_other_changes_are_noticed():
    def changed(change):
        model = supported_model("llama")
        runtime = LayerSkipRuntime(model)
        change(model)
        return runtime

    layer = "model.layers.2.mlp.up_proj.weight"

    def replace(model):
        linear = model.model.layers[2].mlp.up_proj
        linear.weight = nn.Parameter(linear.weight.detach().clone())

    def other_data(model):
        linear = model.model.layers[2].mlp.up_proj
        linear.weight.data = linear.weight.data.clone()

    def add_hook(model):
        model.model.layers[1].register_forward_hook(lambda *_: None)

    for change, message in [
        (lambda model: model.to(torch.bfloat16), "is now BFloat16"),
        (replace, f"{layer} was replaced"),
        (other_data, f"{layer} was .* at another address"),
        (lambda model: model.train(), "training mode"),
        (add_hook, "model.layers.1 has a forward hook"),
    ]:
        runtime = changed(change)
        with pytest.raises(RuntimeError, match=message):
            runtime.generate(tiny_tokens(), max_new_tokens=1)


def test_unfit_weights_are_refused():
    with pytest.raises(TypeError, match="Double"):
        LayerSkipRuntime(supported_model("llama").double())
    mixed = supported_model("llama")
    mixed.model.norm.to(torch.bfloat16)
    with pytest.raises(TypeError, match="one dtype"):
        LayerSkipRuntime(mixed)
    wrapped = supported_model("llama")
    wrapped.model.layers[0].mlp.up_proj = nn.Sequential(wrapped.model.layers[0].mlp.up_proj)
    with pytest.raises(TypeError, match=r"mlp.up_proj is a Sequential"):
        LayerSkipRuntime(wrapped)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(supported_model("llama").config)
    with pytest.raises(ValueError, match="meta device"):
        LayerSkipRuntime(empty.eval())


def test_bad_tokens_are_refused_and_the_cache_stays_usable():
    model, ids = supported_model("llama"), tiny_tokens(length=8)
    runtime = LayerSkipRuntime(model)
    cache = runtime.new_cache(2)
    for bad, error, message in [
        (torch.full((2, 1), VOCAB_SIZE), ValueError, f"holds {VOCAB_SIZE}"),
        (torch.full((2, 1), -1), ValueError, "holds -1"),
        (torch.ones(1, 1, dtype=torch.long), ValueError, "shape"),
        (torch.ones(2, 0, dtype=torch.long), ValueError, "shape"),
        (torch.ones(2, 1, dtype=torch.int32), TypeError, "int64"),
        (torch.ones(2, 65, dtype=torch.long), ValueError, "the model's limit is 64"),
    ]:
        with pytest.raises(error, match=message):
            runtime.append(cache, bad)
    with pytest.raises(ValueError, match="last 2 tokens were asked of 1"):
        runtime.append(cache, ids[:, :1], 2)
    assert_close(runtime.append(cache, ids, 8), expected_logits(model, ids), 2e-5)


@pytest.mark.parametrize("mask", [[[1, 1, 0]], [[0, 1, 0]], [[0, 0, 0]]])
def test_masks_that_are_not_left_padding_are_refused(mask):
    with pytest.raises(ValueError, match="left padding"):
        LayerSkipRuntime(supported_model("llama")).new_cache(1, torch.tensor(mask))


def test_a_cache_of_another_runtime_is_refused():
    runtime, other = LayerSkipRuntime(supported_model("llama")), LayerSkipRuntime(supported_model("llama"))
    with pytest.raises(ValueError, match="another runtime"):
        runtime.append(other.new_cache(1), torch.ones(1, 1, dtype=torch.long))


def test_weights_outlive_the_model():
    model, ids = supported_model("llama"), tiny_tokens(length=8)
    runtime = LayerSkipRuntime(model)
    cache = runtime.new_cache(2)
    expected = expected_logits(model, ids)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    del model
    assert_close(runtime.append(cache, ids, 8), expected, 2e-5)


def test_longrope_is_run_within_its_first_set_of_frequencies():
    factors = [1.0 + 0.1 * i for i in range(8)]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": [4.0] * 8}
    model = tiny_model(
        "phi3",
        hidden_size=64,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=rope | {"original_max_position_embeddings": 16, "partial_rotary_factor": 1.0},
    )
    runtime, ids = LayerSkipRuntime(model), tiny_tokens(length=16)
    assert_close(runtime_logits(runtime, ids, 1), expected_logits(model, ids), 2e-5)
    with pytest.raises(ValueError, match="limit is 16"):
        runtime.append(runtime.new_cache(1), torch.ones(1, 17, dtype=torch.long))
    assert math.isfinite(runtime.weight_bytes)
