import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import NUM_LAYERS, TINY_CONFIGS, tiny_model, tiny_tokens

from e3pruner.models import find_layers, last_hidden, skipped
from e3pruner.models.skipping_forward import SkippingForward, shared_prefixes

MASKS = [
    (False, True, True, True, True, True),
    (True, True, False, True, True, False),
    (True, True, False, False, True, True),
    (True, True, True, True, True, True),
]
layer_masks = st.tuples(*[st.booleans()] * NUM_LAYERS).filter(any)


def plain(model, ids, mask):
    with skipped(model, [layer for layer, runs in enumerate(mask) if not runs]):
        return last_hidden(model, ids)


def assert_shared_equals_plain(model, ids, masks):
    with SkippingForward(model) as forward:
        dense = forward.dense({"input_ids": ids})
        shared = dict(forward.last_hiddens({"input_ids": ids}, masks))
    assert shared.keys() == set(masks)
    assert torch.equal(dense, last_hidden(model, ids))
    for mask, hidden in shared.items():
        assert torch.equal(hidden, plain(model, ids, mask)), mask


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
@torch.no_grad()
def test_shared_prefixes_change_nothing(model_type):
    assert_shared_equals_plain(tiny_model(model_type), tiny_tokens(), MASKS)


@given(masks=st.lists(layer_masks, min_size=1, max_size=6, unique=True))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_any_set_of_masks(masks):
    assert_shared_equals_plain(tiny_model("llama"), tiny_tokens(), masks)


@torch.no_grad()
def test_shared_layers_run_once():
    model, ids = tiny_model("llama"), tiny_tokens()
    calls = []
    for index, layer in enumerate(find_layers(model)):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    with SkippingForward(model) as forward:
        forward.dense({"input_ids": ids})
        calls.clear()
        assert len(list(forward.last_hiddens({"input_ids": ids}, MASKS))) == len(MASKS)
    assert len(calls) == sum(sum(mask[shared:]) for mask, shared in shared_prefixes(MASKS)) < sum(map(sum, MASKS))
    assert calls.count(0) == 1


@torch.no_grad()
def test_states_are_the_inputs_of_the_layers():
    model, ids = tiny_model("gpt2"), tiny_tokens()
    expected = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    with SkippingForward(model) as forward:
        states, last = forward.states({"input_ids": ids})
    assert len(states) == NUM_LAYERS + 1
    for state, hidden in zip(states[:-1], expected[:-1], strict=True):
        assert torch.equal(state, hidden)
    assert torch.equal(model.transformer.ln_f(states[-1]), expected[-1])
    assert torch.equal(last, expected[-1])


def test_layers_get_their_own_forward_back():
    model = tiny_model("llama")
    first, second = find_layers(model)[:2]
    second.forward = own = second.forward
    with SkippingForward(model):
        assert "forward" in vars(first)
        assert vars(second)["forward"] is not own
    assert "forward" not in vars(first)
    assert vars(second)["forward"] is own
