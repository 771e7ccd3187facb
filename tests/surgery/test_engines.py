"""Engines that fix in their code what a layer is: named when the cut breaks their rule, and kept to where asked."""

import warnings

import pytest
from tiny_models import NUM_LAYERS, tiny_model, tiny_tokens
from transformers import AutoConfig

import e3pruner
from e3pruner.mask_search import METHODS
from e3pruner.surgery.config import pruned_config
from e3pruner.surgery.engines import ENGINES, FACTS, orders_of

PERIOD_2 = ["sliding_attention", "full_attention"] * 3
PERIOD_3 = {"no_rope_layers": [1, 1, 1, 0, 1, 1]}


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: f"{fact.engine}-{fact.model_type}")
def test_a_rule_is_that_of_the_type_as_it_is_published(fact):
    """The default configuration of the type follows the rule: the fact speaks of this setting and these kinds."""
    order = fact.order(AutoConfig.for_model(fact.model_type))
    assert order is not None
    assert set(order.kinds) == set(fact.cycle)


@pytest.mark.parametrize(
    ("model_type", "changes", "kept", "engines"),
    [
        ("gemma2", {"layer_types": PERIOD_2}, [0, 1, 3, 4], ["llama.cpp", "SGLang"]),
        ("gemma2", {"layer_types": PERIOD_2}, [0, 3, 4, 5], []),
        ("gpt_oss", {"layer_types": PERIOD_2}, [1, 2], ["vLLM"]),
        ("smollm3", {"layer_types": None, **PERIOD_3}, [0, 1, 3, 4], ["llama.cpp"]),
        ("smollm3", {"layer_types": None, **PERIOD_3}, [0, 1, 2, 3, 5], []),
        ("gemma2", {}, [0, 1, 3, 4], []),  # the dense model does not follow the rule either
    ],
)
def test_prune_names_the_engines_whose_rule_is_broken(model_type, changes, kept, engines):
    model = tiny_model(model_type, **changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        e3pruner.prune(model, kept)
    said = [str(each.message) for each in caught if "over and over" in str(each.message)]
    assert [text.split(" (")[0] for text in said] == engines
    assert all(f"wrongly; search with quota={name!r}" in text for name, text in zip(engines, said, strict=True))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("angular", "clp", "contiguous")])
def test_a_search_can_keep_to_the_rule_of_an_engine(method):
    model = tiny_model("gemma2", layer_types=PERIOD_2)
    options = {"generations": 2, "offspring": 3} if method == "evolution" else {}
    plan = e3pruner.search(
        model, [tiny_tokens()], drop=3, method=method, quota="llama.cpp", precision="fp32", progress=False, **options
    )
    assert [PERIOD_2[layer] for layer in plan.kept] == PERIOD_2[:3]


def test_an_engine_that_is_not_known_is_refused_by_name():
    config = tiny_model("gemma2").config
    assert set(ENGINES) == {"llama.cpp", "SGLang", "vLLM"}
    assert orders_of(config, "vllm") == []
    with pytest.raises(ValueError, match=r"quota='ollama' names no engine.*known are llama\.cpp, SGLang, vLLM"):
        orders_of(config, "ollama")


def test_a_spacing_that_the_list_contradicts_goes(tmp_path):
    config = tiny_model("smollm3", layer_types=None, **PERIOD_3).config
    assert config.no_rope_layer_interval == 4
    for kept, stays in (([0, 1, 3, 4], False), ([0, 1, 2, 3], True)):
        pruned = pruned_config(config, kept)
        assert ("no_rope_layer_interval" in pruned.to_dict()) is stays
        pruned.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
        assert again.no_rope_layers == [config.no_rope_layers[layer] for layer in kept]
    assert len(config.no_rope_layers) == NUM_LAYERS
