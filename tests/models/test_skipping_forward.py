import itertools
import math
import weakref
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep.shrink import small_config, small_model
from tiny_models import NUM_LAYERS, TINY_CONFIGS, of_one, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from e3pruner.models import find_layers, last_hidden, skipped
from e3pruner.models.layer_calls import Way, route_of
from e3pruner.models.skipping_forward import SkippingForward, shared_prefixes
from e3pruner.models.streaming import computing_in

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
    forward, inputs = SkippingForward(model), {"input_ids": ids}
    dense = forward.dense(inputs)
    shared = of_one(forward, inputs, masks)
    assert list(shared) == sorted(masks, reverse=True)
    assert torch.equal(dense, last_hidden(model, ids))
    for mask, hidden in shared.items():
        assert torch.equal(hidden, plain(model, ids, mask)), mask


def lone_cuts():
    """Each layer removed alone, and none."""
    return [tuple(layer != gone for layer in range(NUM_LAYERS)) for gone in range(NUM_LAYERS + 1)]


def recorded_runs(model):
    """A list to which every layer that really runs adds its index and the rows of its batch."""
    runs = []
    for index, layer in enumerate(find_layers(model)):
        layer.mlp.register_forward_hook(lambda _, args, out, index=index: runs.append((index, len(args[0]))))
    return runs


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
@torch.no_grad()
def test_shared_prefixes_change_nothing(model_type):
    assert_shared_equals_plain(tiny_model(model_type), tiny_tokens(), MASKS)


@given(masks=st.lists(layer_masks, min_size=1, max_size=6, unique=True))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_any_set_of_masks(masks):
    assert_shared_equals_plain(tiny_model("llama"), tiny_tokens(), masks)


@pytest.mark.parametrize("masks", [MASKS, lone_cuts()], ids=["some", "lone cuts"])
@pytest.mark.parametrize("prefixes_per_call", [1, 2, 16])
@torch.no_grad()
def test_a_step_enters_each_layer_once(masks, prefixes_per_call):
    model, inputs = tiny_model("llama"), {"input_ids": tiny_tokens()}
    forward = SkippingForward(model, prefixes_per_call=prefixes_per_call)
    list(forward.last_hiddens([inputs], masks))  # the first time it is proven by passes of the whole model
    runs = recorded_runs(model)
    assert len(list(forward.last_hiddens([inputs], masks))) == len(masks)
    assert runs == sorted(runs, key=lambda run: run[0])
    for layer in range(NUM_LAYERS):
        prefixes = {mask[: layer + 1] for mask in masks if mask[layer]}
        rows = [rows for index, rows in runs if index == layer]
        assert sum(rows) == len(prefixes) * 2
        assert len(rows) == math.ceil(len(prefixes) / prefixes_per_call)
    assert sum(rows for _, rows in runs) == 2 * sum(sum(mask[shared:]) for mask, shared in shared_prefixes(masks))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "bloom", "zaya"])
@torch.no_grad()
def test_batches_share_the_visit_to_a_layer(model_type):
    model = tiny_model(model_type)
    batches = [{"input_ids": tiny_tokens(2)}, {"input_ids": tiny_tokens(1)[:, :7]}, {"input_ids": tiny_tokens(3)}]
    forward = SkippingForward(model)
    entered = []
    for index, layer in enumerate(find_layers(model)):
        part = next(layer.children())
        part.register_forward_hook(lambda _, args, output, index=index: entered.append(index))
    list(forward.last_hiddens(batches, MASKS))  # the first time it is proven by passes of the whole model
    entered.clear()
    found = dict(forward.last_hiddens(batches, MASKS))
    assert entered
    assert entered == sorted(entered)
    for mask, hiddens in found.items():
        for batch, hidden in zip(batches, hiddens, strict=True):
            assert torch.equal(hidden, plain(model, batch["input_ids"], mask))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "bloom", "falcon", "gpt2", "opt", "qwen3_moe", "zaya"])
@torch.no_grad()
def test_joined_calls_round_and_no_more(model_type):
    model = tiny_model(model_type)
    padding = torch.ones(3, 12, dtype=torch.long)
    padding[0, :4] = padding[2, :1] = 0
    for inputs in ({"input_ids": tiny_tokens(1)}, {"input_ids": tiny_tokens(3), "attention_mask": padding}):
        alone, joined = (
            of_one(SkippingForward(model, prefixes_per_call=count), inputs, lone_cuts()) for count in (1, 3)
        )
        assert alone.keys() == joined.keys()
        for mask in alone:
            torch.testing.assert_close(joined[mask], alone[mask], rtol=1e-3, atol=1e-3, equal_nan=True)


@torch.no_grad()
def test_groups_of_masks_bound_the_memory():
    model, inputs = tiny_model("llama"), {"input_ids": tiny_tokens()}
    masks = list(itertools.product((True, False), repeat=4))
    masks = [(*mask, True, True) for mask in masks]
    forward = SkippingForward(model)
    expected = of_one(forward, inputs, masks)
    alive, most = [], []

    def count(layer, args, output):
        alive.append(weakref.ref(output))
        most.append(len({id(each()) for each in alive if each() is not None}))

    for layer in find_layers(model):
        layer.register_forward_hook(count)
    for at_once, bound in ((1, 5), (3, 9), (None, 35)):
        alive.clear()
        most.clear()
        forward = SkippingForward(model, masks_at_once=at_once)
        for mask, (hidden,) in forward.last_hiddens([inputs], masks):
            assert torch.equal(hidden, expected[mask])
            del hidden
        assert max(most) <= bound
    assert max(most) > 16


@torch.no_grad()
def test_state_that_passes_behind_the_calls_is_found_out():
    model, inputs = tiny_model("llama"), {"input_ids": tiny_tokens()}
    layers, memo = find_layers(model), {}
    layers[2].mlp.register_forward_hook(lambda _, args, output: memo.update(kept=output))
    layers[4].mlp.register_forward_hook(lambda _, args, output: output + memo["kept"])
    shortest, other = (True, True, True, False, True, False), MASKS[0]
    for mask in (shortest, other):  # one mask at a time is right
        ((_, (found,)),) = SkippingForward(model).last_hiddens([inputs], [mask])
        assert torch.equal(found, plain(model, inputs["input_ids"], mask))
    with pytest.raises(ValueError, match=r"model \(llama\): its layers, called one by one .* differs by"):
        list(SkippingForward(model).last_hiddens([inputs], [shortest, other]))
    with pytest.raises(ValueError, match=r"model \(llama\): its layers, called one by one .* differs by"):
        list(SkippingForward(model).last_hiddens([inputs, {"input_ids": tiny_tokens() + 1}], [shortest]))


@torch.no_grad()
def test_weights_that_change_between_two_walks_are_those_that_it_is_held_to():
    model, inputs, whole = tiny_model("llama"), {"input_ids": tiny_tokens()}, (True,) * 6
    list(SkippingForward(model).last_hiddens([inputs], [whole]))
    for parameter in model.parameters():
        parameter.mul_(1.1)
    ((_, (found, _)),) = SkippingForward(model).last_hiddens([inputs, inputs], [whole])
    assert torch.equal(found, last_hidden(model, **inputs))


@torch.no_grad()
def test_layers_may_write_into_what_they_are_given():
    model, inputs = tiny_model("llama"), {"input_ids": tiny_tokens()}
    for layer in find_layers(model):
        own = layer.forward
        layer.forward = lambda hidden, own=own, **kwargs: hidden.add_(own(hidden.clone(), **kwargs))
    assert_shared_equals_plain(model, inputs["input_ids"], lone_cuts())


@torch.no_grad()
def test_states_are_the_inputs_of_the_layers():
    model, ids = tiny_model("gpt2"), tiny_tokens()
    expected = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    states, last = SkippingForward(model).states({"input_ids": ids})
    assert len(states) == NUM_LAYERS + 1
    for state, hidden in zip(states[:-1], expected[:-1], strict=True):
        assert torch.equal(state, hidden)
    assert torch.equal(model.transformer.ln_f(states[-1]), expected[-1])
    assert torch.equal(last, expected[-1])


def test_layers_get_their_own_forward_back():
    model = tiny_model("llama")
    first, second = find_layers(model)[:2]
    second.forward = own = second.forward
    for ids, raises in ((tiny_tokens(), False), (torch.tensor([[10**6]]), True)):  # beyond the vocabulary
        with pytest.raises(IndexError) if raises else nullcontext(), torch.no_grad():
            list(SkippingForward(model).last_hiddens([{"input_ids": ids}], MASKS))
        assert "forward" not in vars(first)
        assert vars(second)["forward"] is own


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("count", [1, 7])
@torch.no_grad()
def test_a_route_is_learnt_and_proven_on_a_few_tokens(count, padded):
    model, inputs = tiny_model("llama"), {"input_ids": tiny_tokens(4, 64)}
    if padded:
        inputs["attention_mask"] = torch.ones(4, 64, dtype=torch.long)
        inputs["attention_mask"][0, :40] = 0
    runs, tokens = recorded_runs(model), []
    for layer in find_layers(model):
        layer.mlp.register_forward_hook(lambda _, args, output: tokens.append(output[..., 0].numel()))
    work = []
    for _ in range(2):
        tokens.clear()
        of_one(SkippingForward(model), inputs, lone_cuts()[:count])
        work.append(sum(tokens))
    assert 0 < work[0] - work[1] <= 5 * NUM_LAYERS * 8
    assert runs


@torch.no_grad()
def test_the_first_recorded_pass_teaches_the_route():
    model, inputs = tiny_model("llama"), {"input_ids": tiny_tokens()}
    forward = SkippingForward(model)
    forward.states(inputs)
    runs = recorded_runs(model)
    route_of(model, inputs)
    assert not runs
    route_of(model, inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])})
    assert [layer for layer, _ in runs] == list(range(NUM_LAYERS))


def test_a_more_general_way_covers_what_it_does_more_of():
    assert Way(2, True, True).covers(Way(2, False, True))
    assert not Way(2, True, False).covers(Way(2, False, True))
    assert not Way(2, True, True).covers(Way(1, False, False))


@pytest.mark.parametrize("model_type", sorted({*TINY_CONFIGS} - {"gpt2", "opt"}))  # which do more than norm at the end
@torch.no_grad()
def test_the_model_around_its_layers_runs_once_for_all_masks(model_type):
    model, inputs, runs = tiny_model(model_type), {"input_ids": tiny_tokens()}, []
    masks = lone_cuts()
    of_one(SkippingForward(model), inputs, masks)
    model.get_input_embeddings().register_forward_hook(lambda *_: runs.append(1))
    of_one(SkippingForward(model), inputs, masks)
    assert len(runs) == 1


@torch.no_grad()
def test_a_route_learnt_with_wide_weights_is_not_that_of_narrow_ones():
    """Mamba casts what its layers hand to the last norm, where the weights are narrow."""
    model, mask = small_model(small_config("mamba"), AutoModelForCausalLM), (True,) * 5 + (False,)
    forward, inputs = SkippingForward(model), {"input_ids": tiny_tokens()}
    of_one(forward, inputs, [mask])
    with computing_in(model, torch.bfloat16), skipped(model, [5]):
        expected = last_hidden(model, **inputs)
    with computing_in(model, torch.bfloat16):
        assert torch.equal(of_one(forward, inputs, [mask])[mask], expected)
