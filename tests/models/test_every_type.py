"""A model type of each family through the sweep of all of them (`python -m tests.sweep`): exact, whatever its class."""

import pytest
from sweep.checks import examine
from transformers import AutoModelForCausalLM

FAMILIES = ["llama", "bert", "bart", "openai-gpt", "xlstm", "recurrent_gemma", "modernbert-decoder", "minicpm3"]
# Layers that share weights, count from 1, have settings of their own or break the type's own cache.
KNOTTED = ["bamba", "cpmant", "dots3_note_text", "gemma4_unified_text", "granitemoehybrid", "qwen4_exp_text", "zamba"]
# One tensor for all layers, modules that are exchanged when the model is called, several hidden states for the head,
# adapters inside the weights that layers share.
KNOTTED += ["gemma3n_text", "big_bird", "prophetnet", "zamba2"]
UNFIT = {
    "rwkv": "rescale_every=6",
    "reformer": "ReformerOutput",
    "xlm": "no decoder stack",
}


@pytest.mark.parametrize("model_type", FAMILIES + KNOTTED)
def test_a_type_of_each_family_is_exact(model_type):
    found = examine(model_type, AutoModelForCausalLM)
    assert found["outcome"] == "exact", found


@pytest.mark.parametrize("model_type", UNFIT)
def test_a_type_that_cannot_be_pruned_is_refused_before_the_search(model_type):
    found = examine(model_type, AutoModelForCausalLM)
    assert found["outcome"] == "refused", found
    assert UNFIT[model_type] in found["checks"]["search"], found
