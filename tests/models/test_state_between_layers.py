"""What a layer is given beside the hidden state: a skipped layer hands it on, and masks that share layers share it."""

from contextlib import ExitStack
from itertools import combinations

import pytest
import torch
from tiny_models import NUM_LAYERS, STATEFUL_CONFIGS, of_one, tiny_model, tiny_tokens
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from e3pruner.models import find_layers, last_hidden, skipped
from e3pruner.models.skipping_forward import SkippingForward

# By model type: the argument that carries the state, and layers that may go (the others compute what they share).
STATE = {
    "zaya": (1, [0, 2, 3, 5]),
    "glm_moe_dsa": ("prev_topk_indices", [1, 2, 4, 5]),
    "hy_v4": ("prev_topk_indices", [1, 2, 4, 5]),
    "gemma4_text": (None, [0, 1, 4, 5]),
}
TYPES = [name for name in [*STATEFUL_CONFIGS, "gemma4_text"] if name in CONFIG_MAPPING]
IDS = {"input_ids": tiny_tokens()}


def stateful(model_type):
    return tiny_model(model_type, **({"hidden_size_per_layer_input": 8} if model_type == "gemma4_text" else {}))


def mask_of(removed):
    return tuple(layer not in removed for layer in range(NUM_LAYERS))


def bypassed(model, removed, state, inputs):
    """The last hidden state where every layer runs, but what comes out of the removed ones is what went in."""

    def bypass(layer, args, kwargs, output):
        given = dict(enumerate(args)) | kwargs
        return (given[0], given[state]) if isinstance(output, tuple) else given[0]

    with ExitStack() as stack:
        for index in removed:
            handle = find_layers(model)[index].register_forward_hook(bypass, with_kwargs=True)
            stack.callback(handle.remove)
        return last_hidden(model, **inputs)


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_a_skipped_layer_hands_on_what_it_was_given(model_type):
    model, (state, may_go) = stateful(model_type), STATE[model_type]
    for removed in combinations(may_go, 2):
        with skipped(model, removed):
            found = last_hidden(model, **IDS)
        assert torch.equal(found, bypassed(model, removed, state, IDS)), removed


@pytest.mark.parametrize("prefixes_per_call", [1, 3])
@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_masks_that_share_layers_share_their_state(model_type, prefixes_per_call):
    model, (state, may_go) = stateful(model_type), STATE[model_type]
    masks = {mask_of(removed): removed for size in (0, 1, 2) for removed in combinations(may_go, size)}
    forward = SkippingForward(model, prefixes_per_call=prefixes_per_call)
    found = of_one(forward, IDS, list(masks))
    for mask, removed in masks.items():
        expected = bypassed(model, removed, state, IDS)
        if prefixes_per_call == 1:
            assert torch.equal(found[mask], expected), removed
        torch.testing.assert_close(found[mask], expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_a_model_adds_between_its_layers_is_added_once():
    vision = {"depth": NUM_LAYERS + 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "patch_size": 4}
    text = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": NUM_LAYERS}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    config = AutoConfig.for_model(
        "qwen3_vl",
        text_config=text,
        image_token_id=98,
        vision_config=vision | {"out_hidden_size": 32, "deepstack_visual_indexes": [0, 1, 2]},
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    ids = tiny_tokens()
    ids[:, 2:6] = config.image_token_id
    patches = torch.randn(2 * 16, 3 * 2 * 4 * 4)
    inputs = {"input_ids": ids, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
    masks = {mask_of(removed): removed for size in (0, 1, 2) for removed in combinations(range(NUM_LAYERS), size)}
    found = of_one(SkippingForward(model), inputs, list(masks))
    for mask, removed in masks.items():
        assert torch.equal(found[mask], bypassed(model, removed, None, inputs)), removed
