"""A search proposes only what surgery can do, and says before it runs the model where that is nothing."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_search.conftest import QUICK
from tiny_models import NUM_LAYERS, tiny_model, tiny_tokens
from tiny_vision_models import tiny_vision_model

import e3pruner
from e3pruner.mask_search import METHODS
from e3pruner.mask_search.units import Units, units_of
from e3pruner.surgery.demands import Limit, Order, check_kept

BATCHES = [tiny_tokens(seed=seed) for seed in range(2)]
LAYERS = 6
IN_A_ROW = {"angular", "clp", "contiguous"}


def search(model, method="bi", **arguments):
    arguments = {"progress": False, "precision": "fp32"} | QUICK.get(method, {}) | arguments
    return e3pruner.search(model, BATCHES, method=method, **arguments)


@pytest.fixture(scope="module")
def models():
    return {
        "qwen3_next": tiny_model("qwen3_next", layer_types=["linear_attention"] * 5 + ["full_attention"]),
        "jamba": tiny_model("jamba"),
        "qwen3_vl": tiny_vision_model("qwen3_vl"),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["qwen3_next", "jamba", "qwen3_vl"])
def test_every_method_proposes_what_can_be_cut(method, model_type, models):
    model = models[model_type]
    plan = search(model, method, drop=2, seed=1)
    assert len(plan.removed) == 2
    check_kept(model.config, plan.kept)
    if method in ("gumbel-topk", "last-n"):
        assert e3pruner.prune(model, plan).config.get_text_config().num_hidden_layers == 4


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].sublayers])
def test_a_layer_that_must_stay_may_lose_a_sublayer_but_not_both(method, models):
    model = models["qwen3_vl"]
    plan = search(model, method, drop=6, granularity="sublayer", protect=[3, 4])
    assert not {0, 1} & set(plan.removed)
    check_kept(model.config, plan.kept)


limits = st.builds(
    lambda members, most: Limit(frozenset(members), min(most, len(members)), "limit"),
    st.sets(st.integers(0, LAYERS - 1), min_size=1),
    st.integers(0, 3),
)
kinds = st.lists(st.integers(0, 1), min_size=LAYERS, max_size=LAYERS).map(tuple)
orders = st.builds(lambda kinds: Order(kinds, kinds, "order"), kinds)
whole_values = st.lists(st.integers(-9, 9).map(float), min_size=2 * LAYERS, max_size=2 * LAYERS)


@given(
    demands=st.lists(limits | orders, max_size=3),
    values=whole_values,
    drop=st.integers(1, 5),
    size=st.integers(1, 2),
    protect=st.sets(st.integers(0, LAYERS - 1), max_size=2),
    gone=st.sets(st.integers(0, LAYERS - 1), max_size=2),
    like=st.sets(st.integers(0, LAYERS - 1), max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_the_cheapest_is_the_cheapest_of_all(demands, values, drop, size, protect, gone, like):
    free = [unit for unit in range(size * LAYERS) if unit // size not in protect]
    units = Units(size * LAYERS, size, free, [(free, min(drop, len(free) - 1))], demands)
    sets = [set(each) for each in itertools.combinations(free, units.groups[0][1]) if gone <= set(each)]
    costs = [(len(like - each), sum(values[u] for u in each), -sum(each)) for each in sets if units.fits(each)]
    found = units.cheapest(values, gone=gone, like=like)
    if found is None:
        assert not costs
    else:
        own = (len(like - set(found)), sum(values[u] for u in found), -sum(found))
        assert own == min(costs)


@pytest.mark.parametrize(
    ("model_type", "changes", "arguments", "message"),
    [
        (
            "qwen3_next",
            {},
            {"drop": 3, "protect": [0, 2, 4]},
            r"drop=3 has no plan .*\(qwen3_next\) allows: one of the",
        ),
        ("gemma4_text", {}, {"drop": 5}, r"drop=5 .* layers 4 read the keys and values of layers 3"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, {"protect": [5]}, r"only the last layers may go"),
        ("jamba", {}, {"method": "contiguous", "drop": 5, "protect": [0]}, r"drop=5 .*config\.attn_layer_period=2"),
    ],
)
def test_what_cannot_be_cut_is_said_before_the_model_runs(model_type, changes, arguments, message):
    model = tiny_model(model_type, **changes)
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=message):
        search(model, **{"drop": 2} | arguments)


def test_what_no_demand_declares_is_tried_before_the_model_runs(monkeypatch):
    """As for a model type that nobody has looked at yet."""
    monkeypatch.setattr("e3pruner.surgery.demands._COUNTING", {})
    model = tiny_model("diffllama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=r"layer \d cannot become layer \d: .* self_attn: lambda_init from"):
        search(model, drop=2)


def test_a_layer_that_must_stay_has_no_importance_of_its_own(models):
    plan = search(models["qwen3_vl"], "leave-one-out", drop=2)
    importance = plan.history[0]["importance"]
    assert importance[:2] == [None, None]
    assert all(value > 0 for value in importance[2:])


def test_units_without_demands_are_as_before():
    units = units_of(tiny_model("llama"), 2)
    assert units.demands == []
    assert units.cheapest(torch.arange(NUM_LAYERS).tolist()) == [0, 1]
    assert units.cheapest([0.0] * NUM_LAYERS) == [4, 5]
