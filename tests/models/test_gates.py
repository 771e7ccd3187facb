import pytest
import torch
from tiny_models import NUM_LAYERS, TINY_CONFIGS, tiny_model, tiny_tokens
from transformers import DynamicCache

from e3pruner.compat import CACHE
from e3pruner.models import find_layers, gated, skipped

REMOVED = [0, 2, 5]


def mask_of(removed):
    mask = torch.ones(NUM_LAYERS)
    mask[list(removed)] = 0
    return mask


def logits(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
@torch.no_grad()
def test_hard_gates_equal_skipping(model_type):
    model, ids = tiny_model(model_type), tiny_tokens()
    dense = logits(model, ids)
    with gated(model, mask_of(REMOVED)):
        masked = logits(model, ids)
    with skipped(model, REMOVED):
        assert torch.equal(logits(model, ids), masked)
    assert not torch.allclose(masked, dense, rtol=0.1)
    assert torch.equal(logits(model, ids), dense)


def test_gate_gradient_is_that_of_the_loss():
    model, ids = tiny_model("gpt2").double(), tiny_tokens(length=6)  # a type without casts to fp32 inside
    gates = torch.linspace(0.2, 0.9, NUM_LAYERS, dtype=torch.float64).requires_grad_()

    def loss(values):
        with gated(model, values):
            return logits(model, ids).square().mean()

    (gradient,) = torch.autograd.grad(loss(gates), gates)
    for layer in range(NUM_LAYERS):
        step = torch.zeros_like(gates)
        step[layer] = 1e-6
        with torch.no_grad():
            slope = (loss(gates + step) - loss(gates - step)) / 2e-6
        torch.testing.assert_close(gradient[layer], slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("model_type", ["llama", "falcon"])
@torch.no_grad()
def test_one_mask_a_sample(model_type):
    model, ids = tiny_model(model_type), tiny_tokens(batch=3)
    masks = [mask_of(removed) for removed in ([1], [], [0, 3, 4])]
    with gated(model, torch.stack(masks, dim=1)):
        together = logits(model, ids)
    for sample, mask in enumerate(masks):
        with gated(model, mask):
            alone = logits(model, ids)[sample]
        torch.testing.assert_close(together[sample], alone)


def test_open_gates_that_need_no_gradient_run_no_hook():
    model = tiny_model("llama")
    with gated(model, mask_of([2])):
        assert [len(layer._forward_hooks) for layer in find_layers(model)] == [0, 0, 1, 0, 0, 0]
    with gated(model, mask_of([2]).requires_grad_()):
        assert all(layer._forward_hooks for layer in find_layers(model))


@pytest.mark.parametrize("model_type", ["llama", "bloom", "qwen3_moe"])
def test_gradients_of_masks_a_sample_add_up_to_that_of_a_shared_mask(model_type):
    model, ids = tiny_model(model_type), tiny_tokens(batch=3)
    gradients = []
    for shape in ((NUM_LAYERS,), (NUM_LAYERS, 3)):
        gates = torch.full(shape, 0.5, requires_grad=True)
        with gated(model, gates):
            logits(model, ids).square().mean().backward()
        gradients.append(gates.grad)
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(gradients[1].sum(1), gradients[0], rtol=1e-3, atol=1e-4)


def test_gradients_pass_activation_checkpointing():
    model, ids = tiny_model("gemma2").train(), tiny_tokens()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # old name: 5.17
        gates = torch.full((NUM_LAYERS,), 0.5, requires_grad=True)
        with gated(model, gates):
            logits(model, ids).square().mean().backward()
        gradients.append(gates.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@torch.no_grad()
def test_recorded_hidden_states_are_the_gated_ones():
    model, ids = tiny_model("llama"), tiny_tokens()
    model(ids, output_hidden_states=True)  # installs the recording hooks before the gates
    with gated(model, mask_of([2])):
        states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[3], states[2])
    assert not torch.equal(states[2], states[1])


@pytest.mark.parametrize("model_type", ["llama", "gptj"])
@pytest.mark.parametrize("context", [lambda m: gated(m, torch.full((NUM_LAYERS,), 0.5)), lambda m: skipped(m, REMOVED)])
def test_names_hooks_and_forwards_are_as_before_even_after_an_error(model_type, context):
    model = tiny_model(model_type)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(IndexError), context(model):  # beyond the vocabulary
        model(torch.tensor([[10**6]]), use_cache=False)
    with context(model):
        assert [name for name, _ in model.named_modules()] == names
    assert not model._forward_pre_hooks
    for layer in find_layers(model):
        assert not layer._forward_hooks
        assert "forward" not in vars(layer)


@torch.no_grad()
def test_skips_nest_and_leave_a_replaced_forward_in_place():
    model, ids = tiny_model("llama"), tiny_tokens()
    layers = find_layers(model)
    layers[1].forward = lambda hidden, **kwargs: 2 * hidden
    replaced = logits(model, ids)
    with skipped(model, [0, 2]):
        outer = logits(model, ids)
        with skipped(model, [1, 2]):
            assert not torch.equal(logits(model, ids), outer)
        assert torch.equal(logits(model, ids), outer)
    assert torch.equal(logits(model, ids), replaced)


def test_skipping_a_tuple_layer_keeps_its_extra_outputs():
    model, ids = tiny_model("bloom"), tiny_tokens()
    with skipped(model, [0, 3]):
        attentions = model(ids, use_cache=False, output_attentions=True).attentions
    assert [weights is None for weights in attentions] == [True, False, False, True, False, False]


def test_skipping_refuses_a_cache():
    model, ids = tiny_model("llama"), tiny_tokens()
    with skipped(model, [0]):
        with pytest.raises(ValueError, match=f"{CACHE}: a model with skipped layers"):
            model.generate(ids, max_new_tokens=2, do_sample=False)
        for name in (CACHE, "past_key_values"):
            with pytest.raises(ValueError, match=f"{CACHE}: a model with skipped layers"):
                model(ids, use_cache=False, **{name: DynamicCache()})
        assert model.generate(ids, max_new_tokens=2, do_sample=False, use_cache=False).shape == (2, 14)


@pytest.mark.parametrize(
    ("gates", "error", "message"),
    [
        (torch.ones(5), ValueError, r"gates has shape \(5,\); expected \(6,\)"),
        (torch.ones(6, 2, 1), ValueError, r"gates has shape \(6, 2, 1\)"),
        (torch.ones(6, dtype=torch.int64), TypeError, "gates must be a floating tensor, not torch.int64"),
        ([1.0] * 6, TypeError, "gates must be a floating tensor, not list"),
    ],
)
def test_gates_of_another_kind_are_refused(gates, error, message):
    with pytest.raises(error, match=message), gated(tiny_model("llama"), gates):
        pass


def test_gates_for_another_batch_are_refused():
    model = tiny_model("llama")
    with gated(model, torch.zeros(6, 3)), pytest.raises(ValueError, match="each of 3 samples, the batch has 2"):
        model(tiny_tokens(batch=2))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([6], "removed holds 6; a layer index is an integer from 0 to 5"),
        ([-1], "removed holds -1"),
        ([1, 1], r"removed=\[1, 1\] names a layer twice"),
        (range(6), "leaves no layer"),
    ],
)
def test_removed_layers_out_of_range_are_refused(removed, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message), skipped(model, removed):
        pass
