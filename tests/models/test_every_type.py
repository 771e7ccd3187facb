"""A model type of each family through the sweep of all of them (`python -m tests.sweep`): exact, whatever its class."""

import pytest
from sweep.checks import examine
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FAMILIES = ["llama", "bert", "bart", "openai-gpt", "xlstm", "recurrent_gemma", "modernbert-decoder", "minicpm3"]
# Layers that share weights, count from 1, have settings of their own or break the type's own cache.
KNOTTED = ["bamba", "cpmant", "dots3_note_text", "gemma4_unified_text", "granitemoehybrid", "qwen4_exp_text", "zamba"]
# One tensor for all layers, modules that are exchanged when the model is called, several hidden states for the head,
# adapters inside the weights that layers share.
KNOTTED += ["gemma3n_text", "big_bird", "prophetnet", "zamba2"]
# Cut exactly, and distilled or searched where that is another matter: by type, what is asked of it.
OTHERS = {
    "ctrl": ["prune"],
    "doge": ["prune", "generate"],  # the dense model's own cache is at fault
    "dory": ["prune", "distill"],
    "gpt_neox_japanese": ["prune"],
    "longcat_flash": ["prune", "reload"],
    "pegasus": ["prune", "search"],
    "roberta-prelayernorm": ["prune", "search"],
    "rwkv": ["prune", "search"],  # of rows of a batch its own decoding makes nonsense
}
# Types that are built alike, all of them: the decoders of BERT's family and of BART's.
BERTS = "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta"
BERTS += " roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod git"
BARTS = "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper"
UNFIT = {
    "blt": "several stacks",
    "gemma4_assistant": "keys and values of another model",
    "reformer": "ReformerOutput",
    "xlm": "no decoder stack",
}


def known(model_types):
    """Those that this transformers has."""
    return [name for name in model_types if name in CONFIG_MAPPING]


# A factor behind the head, images of an attention of their own, and a model that does not run without one.
WITH_IMAGES = ["aya_vision", "mllama", "blip-2"]


@pytest.mark.parametrize("model_type", known(WITH_IMAGES))
def test_an_image_text_type_is_exact_with_images(model_type):
    found = examine(model_type, AutoModelForImageTextToText)
    assert found["outcome"] == "exact", found
    assert found["checks"]["images"] == "ok"


@pytest.mark.parametrize("model_type", known(FAMILIES + KNOTTED))
def test_a_type_of_each_family_is_exact(model_type):
    found = examine(model_type, AutoModelForCausalLM)
    assert found["outcome"] == "exact", found


@pytest.mark.parametrize("model_type", known(OTHERS))
def test_a_type_of_another_shape_is_exact(model_type):
    found = examine(model_type, AutoModelForCausalLM, OTHERS[model_type])
    assert found["outcome"] == "exact", found


@pytest.mark.slow
@pytest.mark.parametrize("model_type", known(BERTS.split() + BARTS.split()))
def test_types_that_are_built_alike_are_exact(model_type):
    found = examine(model_type, AutoModelForCausalLM, ["prune", "search", "distill"])
    assert found["outcome"] == "exact", found


@pytest.mark.parametrize("model_type", known(UNFIT))
def test_a_type_that_cannot_be_pruned_is_refused_before_the_search(model_type):
    found = examine(model_type, AutoModelForCausalLM, ["prune", "search"])
    assert found["outcome"] == "refused", found
    assert UNFIT[model_type] in found["checks"]["search"], found


def test_a_model_whose_layers_halve_the_hidden_state_is_told_how_to_load_it():
    found = examine("rwkv", AutoModelForCausalLM, ["prune", "search"], rescale_every=2)
    assert found["outcome"] == "refused", found
    assert all("from_pretrained(..., rescale_every=0)" in found["checks"][name] for name in ("prune", "search"))
