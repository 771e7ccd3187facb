"""What a configuration demands of the layers that stay, and that no more is refused than the proof refuses."""

import itertools

import pytest
import torch
from sweep.shrink import small_config, small_model
from tiny_models import NUM_LAYERS, tiny_model, tiny_tokens
from tiny_vision_models import tiny_vision_model
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import e3pruner
from e3pruner.models import skipped
from e3pruner.surgery.config import pruned_config
from e3pruner.surgery.demands import Limit, Order, demands_of

ONE = {"expert_layer_period": 1, "expert_layer_offset": 0}


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("model_type", "changes", "kept"),
    [
        ("jamba", {"attn_layer_period": 2, "expert_layer_period": 2}, [0, 3, 4]),
        ("jamba", {"attn_layer_period": 3, "attn_layer_offset": 2} | ONE, [1, 3, 5]),
        ("ernie4_5_moe", {"moe_layer_interval": 2}, [0, 3]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, [0, 1, 2]),
        ("qwen3_next", {}, [1, 2, 4]),
        ("glm_moe_dsa", {}, [0, 2, 4]),
        ("glm_moe_dsa", {}, [3, 5]),  # nobody is left who reads the choice of layer 0
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, [1, 2, 5]),  # nor the keys and values of layer 3
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, [1, 2, 3, 5]),
        # its decays follow from the index, and are stored with the weights
        ("minimax", {"layer_types": ["linear_attention", "full_attention"] * 3}, [0, 1]),
    ],
)
def test_layers_that_meet_the_demands_are_kept_exactly(model_type, changes, kept):
    model, ids = tiny_model(model_type, **changes), tiny_tokens()
    pruned = e3pruner.prune(model, kept)
    with skipped(model, set(range(NUM_LAYERS)) - set(kept)):
        assert torch.equal(logits(pruned, ids), logits(model, ids))


@pytest.mark.parametrize(
    ("model_type", "changes", "kept", "message"),
    [
        ("jamba", {}, [1, 2, 4], r"\(jamba\): config\.attn_layer_period=2: whether a layer attends follows from its"),
        ("jamba", {"attn_layer_period": 3, "attn_layer_offset": 2}, [0, 1], r"layers that attend \(2, 5\) must stay"),
        ("ernie4_5_moe", {"moe_layer_interval": 2}, [1, 2], r"config\.moe_layer_interval=2: whether a layer holds exp"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, [0, 2], r"layer's index \+ 1; only the last layers may go"),
        ("gemma4_text", {}, [0, 1, 3, 5], r"layers 5 read the keys and values of layers 2, of which one must stay"),
        ("gemma4_text", {}, [0, 2, 4, 5], r"layers 4 read the keys and values of layers 3, of which one must stay"),
        ("gemma4_text", {}, [1, 2, 3, 4], r"the last layer that stays must attend to all tokens, as layers 1, 2, 5 do"),
        ("qwen3_next", {}, [0, 2, 4], r"one of the layers that attend \(1, 3, 5\) must stay: positions"),
        (
            "glm_moe_dsa",
            {},
            [1, 2, 3],
            r"layers 1, 2, 4, 5 read the choice of the indexers of layers 0, of which one m",
        ),
    ],
)
def test_layers_that_break_a_demand_are_refused_before_anything_is_built(model_type, changes, kept, message):
    config = tiny_model(model_type, **changes).config
    with pytest.raises(ValueError, match=rf"kept=.* cannot be kept alone of this model .*{message}"):
        pruned_config(config, kept)


def test_sharing_layers_are_counted_anew():
    """The last two layers of six read the keys and values of layers 2 and 3."""
    config = tiny_model("gemma4_text").config
    assert pruned_config(config, [1, 2, 3, 5]).num_kv_shared_layers == 1
    assert pruned_config(config, [2, 3, 4, 5]).num_kv_shared_layers == 2


@pytest.mark.skipif("mistral_large4" not in CONFIG_MAPPING, reason="of transformers 5.24")
def test_a_layer_reads_the_last_of_its_kind_that_stays():
    """Mistral Large 4 says by index whose keys and values a layer reads, and hands on the last of those with rotary
    positions, and of those without: layers 0 and 2 write the ones, layer 3 the others."""
    sharing = {"no_rope_layers": [1, 1, 1, 0, 0, 1], "kv_source_layers": [0, 0, 2, 3, 3, 2]}
    indexers = {"indexer_types": ["full", "shared", "full", "shared", "full", "shared"]}
    model = small_model(small_config("mistral_large4", text_config=sharing | indexers), AutoModelForImageTextToText)
    for kept, sources in {
        (0, 2, 5): [0, 1, 1],
        (0, 1, 5): [0, 0, 0],
        (2, 3, 4): [0, 1, 1],
        (0, 3, 4, 5): [0, 1, 1, 0],
    }.items():
        pruned = e3pruner.prune(model, kept)
        assert pruned.config.text_config.kv_source_layers == sources
        with skipped(model, set(range(NUM_LAYERS)) - set(kept)):
            assert torch.equal(logits(pruned, tiny_tokens()), logits(model, tiny_tokens()))
    with pytest.raises(ValueError, match=r"layers 1, 5 read the keys and values of layers 0, of which one must stay"):
        pruned_config(model.config, [1, 2, 5])


def test_layers_that_take_turns_with_shared_weights_keep_their_turns():
    """Zamba 2: the layers that attend use two blocks in turn, which the first two of them hold."""
    config = small_config("zamba2")
    weights, turns = (
        next(each for each in demands_of(config) if text in each.reason) for text in ("hold the", "turns")
    )
    assert (weights.members, weights.most) == ({0, 2}, 0)
    assert not turns.broken_by([0, 1, 2, 3, 4])
    assert turns.broken_by([0, 1, 2, 5])
    assert pruned_config(config, [0, 2, 3, 4]).hybrid_layer_ids == [0, 1, 2]


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_vl_moe"])
def test_layers_that_are_given_features_of_the_image_stay(model_type):
    config = tiny_vision_model(model_type).config
    (limit,) = demands_of(config)
    assert (limit.members, limit.most) == ({0, 1}, 0)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "deepseek_v3", "gemma3_text", "falcon", "gpt_neo", "mixtral"])
def test_most_types_demand_nothing(model_type):
    assert demands_of(tiny_model(model_type).config) == []


def test_demands_are_broken_by_what_they_say():
    limit, order = Limit(frozenset({1, 3}), 1, ""), Order((0, 1, 0, 1), (0, 1, 0, 1), "")
    for size in range(1, 5):
        for kept in itertools.combinations(range(4), size):
            assert limit.broken_by(kept) == (not {1, 3} & set(kept))
            assert order.broken_by(kept) == any(old % 2 != new % 2 for new, old in enumerate(kept))
