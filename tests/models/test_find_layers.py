import pytest
from tiny_models import NUM_LAYERS, TINY_CONFIGS, tiny_model
from tiny_vision_models import tiny_vision_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, T5Config, T5ForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

import e3pruner
from e3pruner.models import find_layers
from e3pruner.models.stack import stack_name

KEPT = [0, 2, 5]
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_finds_the_decoder_stack_of_every_type(model_type):
    model = tiny_model(model_type)
    layers = find_layers(model)
    assert isinstance(layers, nn.ModuleList)
    assert len(layers) == NUM_LAYERS
    assert all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)
    assert any(module is layers for module in model.modules())


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("vision_layers", [NUM_LAYERS, len(KEPT)])
def test_a_vision_tower_of_as_many_layers_is_not_the_decoder(model_type, vision_layers):
    """Before the cut, or after it: Gemma 3 4B has 34 text and 27 vision layers."""
    model = tiny_vision_model(model_type, vision_layers=vision_layers)
    assert len(find_layers(model)) == NUM_LAYERS
    assert "vis" not in stack_name(model)
    pruned = e3pruner.prune(model, KEPT)
    assert len(find_layers(pruned)) == len(KEPT)
    assert len(find_layers(model)) == NUM_LAYERS


def test_refuses_an_encoder_decoder():
    model = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8, vocab_size=20))
    with pytest.raises(ValueError, match="encoder-decoder"):
        find_layers(model)


def test_refuses_a_model_without_a_decoder_stack():
    with pytest.raises(TypeError, match="no decoder stack"):
        find_layers(AutoModelForMaskedLM.from_config(BertConfig(**_SMALL)))
    with pytest.raises(TypeError, match="no decoder stack"):
        find_layers(tiny_model("llama").model)
    with pytest.raises(TypeError, match=r"Linear.* not a transformers PreTrainedModel"):
        find_layers(nn.Linear(2, 2))


def test_refuses_a_stack_that_is_not_num_hidden_layers_long():
    model = tiny_model("gpt2")
    model.config.n_layer = 5
    with pytest.raises(ValueError, match=r"one ModuleList of 5 decoder layers .* found none"):
        find_layers(model)


def test_refuses_a_peft_wrapped_model_but_takes_the_merged_one():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="PEFT-wrapped; pass merge_and_unload"):
        find_layers(wrapped)
    with pytest.raises(TypeError, match="PEFT-wrapped"):
        find_layers(wrapped.get_base_model())
    assert len(find_layers(wrapped.merge_and_unload())) == NUM_LAYERS


def test_refuses_a_model_with_an_injected_adapter():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    with pytest.raises(TypeError, match="PEFT-wrapped"):
        find_layers(model)


def test_a_causal_bert_is_a_decoder():
    model = AutoModelForCausalLM.from_config(BertConfig(**_SMALL, is_decoder=True))
    assert len(find_layers(model)) == 2
