"""What may go: layers, sub-layers, and given numbers of each kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_search.conftest import QUICK
from tiny_models import NUM_LAYERS, of_one, tiny_model, tiny_tokens

import e3pruner
from e3pruner.mask_search import METHODS
from e3pruner.mask_search.units import units_of
from e3pruner.models import last_hidden, skipped
from e3pruner.models.skipping_forward import SkippingForward

BATCHES = [tiny_tokens(seed=seed) for seed in range(2)]
LAYER_TYPES = tiny_model("qwen3").config.layer_types
QUOTA = {"sliding_attention": 2, "full_attention": 1}
unit_masks = st.tuples(*[st.booleans()] * (2 * NUM_LAYERS)).filter(any)


def run(method, model_type="llama", **arguments):
    arguments = {"progress": False, "precision": "fp32"} | QUICK.get(method, {}) | arguments
    return e3pruner.search(tiny_model(model_type), BATCHES, method=method, **arguments)


@given(masks=st.lists(unit_masks, min_size=1, max_size=5, unique=True), model_type=st.sampled_from(["llama", "gemma2"]))
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_masks_of_sublayers_share_prefixes_and_change_nothing(masks, model_type):
    model, ids = tiny_model(model_type), tiny_tokens()
    found = of_one(SkippingForward(model, sublayers=True), {"input_ids": ids}, masks)
    units = units_of(model, 1, granularity="sublayer")
    for mask in masks:
        removed, sublayers = units.removed([unit for unit, runs in enumerate(mask) if not runs])
        with skipped(model, removed, sublayers) if len(removed) < NUM_LAYERS else skipped(model, []):
            assert torch.equal(found[mask], last_hidden(model, ids))


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].sublayers])
@pytest.mark.parametrize("drop", [1, 5])
def test_sublayer_methods_remove_exactly_what_they_should(method, drop):
    plan = run(method, drop=drop, protect=[0, 5], granularity="sublayer")
    parts = [*plan.removed, *plan.removed, *plan.sublayers["attention"], *plan.sublayers["mlp"]]
    assert len(parts) == drop
    assert not {0, 5} & set(parts)
    with skipped(tiny_model("llama"), []) if not plan.removed else skipped(tiny_model("llama"), plan.removed):
        assert plan.metrics["kl"] > 0


def test_a_greedy_sublayer_is_the_one_that_is_missed_least():
    model = tiny_model("llama")
    with torch.no_grad():
        teacher = torch.cat([model(ids, use_cache=False).logits.double().log_softmax(-1) for ids in BATCHES])
        scores = {}
        for kind in ("attention", "mlp"):
            for layer in range(NUM_LAYERS):
                with skipped(model, [], {"attention": [], "mlp": []} | {kind: [layer]}):
                    own = torch.cat([model(ids, use_cache=False).logits.double().log_softmax(-1) for ids in BATCHES])
                scores[kind, layer] = (teacher.exp() * (teacher - own)).sum(-1).mean().item()
    plan = run("greedy", drop=1, granularity="sublayer")
    kind, layer = min(scores, key=scores.__getitem__)
    assert plan.sublayers[kind] == [layer]
    assert plan.metrics["kl"] == pytest.approx(scores[kind, layer], rel=1e-4)


def test_units_become_layers_and_parts():
    units = units_of(tiny_model("llama"), 5, granularity="sublayer")
    assert units.removed([0, 2, 3, 7]) == ([1], {"attention": [0], "mlp": [3]})
    assert units_of(tiny_model("llama"), 2).removed([4, 1]) == ([1, 4], {"attention": [], "mlp": []})


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].quotas])
def test_a_quota_is_met(method):
    plan = run(method, "qwen3", drop=3, quota=QUOTA, protect=[0])
    kinds = [LAYER_TYPES[layer] for layer in plan.removed]
    assert {kind: kinds.count(kind) for kind in QUOTA} == QUOTA
    assert 0 not in plan.removed


def test_a_quota_of_sublayers_is_met():
    plan = run("gumbel-topk", drop=4, granularity="sublayer", quota={"attention": 3, "mlp": 1})
    whole = len(plan.removed)
    assert {kind: whole + len(plan.sublayers[kind]) for kind in ("attention", "mlp")} == {"attention": 3, "mlp": 1}


@pytest.mark.parametrize(
    ("method", "model_type", "arguments", "message"),
    [
        ("greedy", "llama", {"quota": {"full_attention": 2}}, r"quota: a llama model has no layer_types"),
        ("greedy", "qwen3", {"quota": {"linear": 2}}, r"quota names linear; the kinds are full_attention, sliding"),
        ("greedy", "qwen3", {"quota": {"full_attention": 1}}, r"removes 1, drop=2; they must agree"),
        ("greedy", "qwen3", {"quota": {"full_attention": 4}, "drop": 4}, r"quota of full_attention is 4; 3 of that"),
        ("evolution", "qwen3", {"quota": {"full_attention": 2}}, r"quota: evolution takes no account of kinds"),
        (
            "bi",
            "llama",
            {"granularity": "sublayer"},
            r"granularity='sublayer': bi removes layers; use one of evolution, greedy, gumbel",
        ),
        ("greedy", "llama", {"granularity": "head"}, r"granularity='head' must be one of layer, sublayer"),
        ("greedy", "mixtral", {"granularity": "sublayer"}, r"has no mlp that ends in one projection"),
        ("greedy", "llama", {"granularity": "sublayer", "drop": 12}, r"drop=12 must be from 1 to 11"),
    ],
)
def test_what_does_not_fit_is_refused(method, model_type, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(method, model_type, **{"drop": 2} | arguments)


@pytest.mark.parametrize("start", ["bi", "uniform", "random"])
def test_other_starts_lead_to_as_good_a_mask_on_a_tiny_model(start):
    plan = run("gumbel-topk", drop=3, start=start)
    first = plan.history[0]
    assert sum(first["importance"][layer] for layer in first["removed"]) > 0
    assert plan.metrics["kl"] <= run("random", drop=3).metrics["kl"]
