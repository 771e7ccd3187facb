import pytest
import torch
from sweep.shrink import small_config, small_model
from tiny_models import TINY_CONFIGS, VOCAB_SIZE, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from e3pruner import prune
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
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # a rotation by other numbers rounds otherwise
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(rebuilt, logits)
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


@pytest.mark.skipif("dory" not in CONFIG_MAPPING, reason="of transformers 5.24")
def test_a_factor_of_each_token_belongs_to_the_weight():
    """Dory's head scales every logit by a factor that it learns; the loss reaches both through the product."""
    model, ids = small_model(small_config("dory"), AutoModelForCausalLM), tiny_tokens()
    rebuilt = output_head(model).logits(last_hidden(model, ids))
    torch.testing.assert_close(rebuilt, model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)
    rebuilt.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (model.lm_head.weight, model.lm_head.logit_scale))


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_named(name, value):
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    found = rf"its logits are not finite: {name} holds 1 value that is NaN or infinite, of [0-9,]+"
    with pytest.raises(ValueError, match=found):
        output_head(model)
    if value != value:  # infinite logits are those of the dense model
        with pytest.raises(ValueError, match=found):
            prune(model, [0, 2, 5])


def test_logits_that_overflow_are_no_missed_factor():
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    with pytest.raises(ValueError, match="its logits are not finite, though all its weights are"):
        output_head(model)
