import pytest
import torch
from tiny_models import TINY_CONFIGS, VOCAB_SIZE, tiny_model, tiny_tokens

from e3pruner.models import last_hidden, output_head


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
@torch.no_grad()
def test_hidden_states_and_head_rebuild_the_logits(model_type):
    model, ids = tiny_model(model_type), tiny_tokens()
    hidden, head = last_hidden(model, ids), output_head(model)
    assert hidden.shape == (*ids.shape, head.weight.shape[1])
    assert head.weight is model.get_output_embeddings().weight
    torch.testing.assert_close(head.logits(hidden), model(ids, use_cache=False).logits, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_padding_changes_the_hidden_states_as_it_does_the_logits():
    model, ids = tiny_model("llama"), tiny_tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    rebuilt = output_head(model).logits(last_hidden(model, ids, mask))
    torch.testing.assert_close(rebuilt, model(ids, attention_mask=mask, use_cache=False).logits)
    assert not torch.equal(rebuilt, output_head(model).logits(last_hidden(model, ids)))


@pytest.mark.parametrize(
    ("model_type", "softcap", "scale"),
    [("gemma2", 5.0, 1.0), ("cohere2", None, 0.25), ("granite", None, 0.25), ("llama", None, 1.0)],
)
def test_softcap_and_scale_are_those_of_the_configuration(model_type, softcap, scale):
    head = output_head(tiny_model(model_type))
    assert (head.softcap, head.scale) == (softcap, scale)


def test_biases_are_kept():
    for model_type in ("phi", "gptj"):
        assert output_head(tiny_model(model_type)).bias.shape == (VOCAB_SIZE,)


def test_a_head_that_does_more_is_refused():
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: 1.01 * output)
    with pytest.raises(ValueError, match=r"model \(llama\): its logits are not softcap"):
        output_head(model)


def test_gradients_reach_the_hidden_states_and_the_modes_are_restored():
    model = tiny_model("llama").train()
    model.model.norm.eval()
    head = output_head(model)
    assert model.training
    assert not model.model.norm.training
    head.logits(last_hidden(model, tiny_tokens())).sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
