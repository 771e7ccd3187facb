"""The rivals' own rules, each against a plain computation of it."""

from itertools import pairwise

import pytest
import torch
from mask_search.conftest import QUICK
from tiny_models import NUM_LAYERS, TINY_CONFIGS, tiny_model, tiny_tokens

import e3pruner
from e3pruner.mask_search.calibration import Calibration
from e3pruner.mask_search.gradient import gate_gradient
from e3pruner.mask_search.methods.clp import concave_gates
from e3pruner.mask_search.methods.straight_through import removed_layers
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.units import units_of
from e3pruner.models import gated, skipped

BATCHES = [tiny_tokens(seed=seed) for seed in range(2)]


def run(method, model=None, **arguments):
    arguments = {"drop": 2, "progress": False, "precision": "fp32"} | QUICK.get(method, {}) | arguments
    return e3pruner.search(model or tiny_model("llama"), BATCHES, method=method, **arguments)


def log_probabilities(model, ids):
    return model(ids, use_cache=False).logits.double().log_softmax(-1)


@pytest.mark.parametrize(
    ("method", "drop", "protect", "removed"),
    [
        ("alternate", 2, [], [2, 4]),
        ("alternate", 3, [], [0, 2, 4]),
        ("alternate", 5, [], [0, 2, 3, 4, 5]),
        ("alternate", 2, [4], [1, 3]),
        ("symmetric", 2, [], [2, 3]),
        ("symmetric", 3, [], [2, 3, 4]),
        ("symmetric", 1, [5], [2]),
    ],
)
def test_what_is_removed_without_looking(method, drop, protect, removed):
    assert run(method, drop=drop, protect=protect).removed == removed


@torch.no_grad()
def test_leave_one_out_by_perplexity_is_the_likelihood_without_one_layer():
    model, expected = tiny_model("gpt2"), []
    for layer in range(NUM_LAYERS):
        with skipped(model, [layer]):
            losses = [-log_probabilities(model, ids)[:, :-1].gather(-1, ids[:, 1:, None]) for ids in BATCHES]
        expected.append(torch.cat(losses).mean().item())
    plan = run("leave-one-out-perplexity", model)
    assert plan.history[0]["importance"] == pytest.approx(expected, rel=1e-5)
    assert plan.removed == sorted(sorted(range(NUM_LAYERS), key=expected.__getitem__)[:2])
    # The first mask lacks the last layer, then each lacks layer l and runs those after it; no dense pass is needed.
    tokens, layer = 48, sum(p.numel() for p in model.transformer.h[0].parameters())
    head = model.lm_head.weight.numel()
    runs = (NUM_LAYERS - 1) + sum(range(NUM_LAYERS))
    cost = tokens * (runs * layer + NUM_LAYERS * head) / (NUM_LAYERS * layer + head)
    assert plan.history[0]["cost"] == pytest.approx(cost)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_taylor_is_the_first_order_change_of_the_loss(precision):
    model = tiny_model("llama")
    model.model.layers[2].requires_grad_(False)
    weights = [list(layer.parameters()) for layer in tiny_model("llama").model.layers]
    plain, expected = tiny_model("llama"), torch.zeros(NUM_LAYERS)
    for ids in BATCHES:
        plain.zero_grad()
        (-log_probabilities(plain, ids)[:, :-1].gather(-1, ids[:, 1:, None])).mean().backward()
        for index, layer in enumerate(plain.model.layers):
            expected[index] += sum((p * p.grad).abs().sum().item() for p in layer.parameters()) / len(BATCHES)
    plan = run("taylor", model, precision=precision)
    assert plan.history[0]["importance"] == pytest.approx(expected.tolist(), rel=1e-4 if precision == "fp32" else 0.1)
    assert plan.removed == sorted(expected.argsort()[:2].tolist())
    assert [p.requires_grad for p in model.model.layers[2].parameters()] == [False] * len(weights[2])
    assert all(p.grad is None for p in model.parameters())


def test_contiguous_is_the_best_run_by_brute_force():
    scores = {start: run("contiguous", drop=3).history[0]["scores"][str(start)] for start in range(NUM_LAYERS - 2)}
    best = min(scores, key=scores.__getitem__)
    assert run("contiguous", drop=3).removed == [best, best + 1, best + 2]
    angular, clp = (run(method, drop=3) for method in ("angular", "clp"))
    for plan in (angular, clp):
        assert plan.metrics["kl"] >= min(scores.values())
        assert plan.removed == list(range(plan.removed[0], plan.removed[0] + 3))


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_the_gradient_by_the_gates_is_that_of_the_plain_divergence(model_type):
    model = tiny_model(model_type)
    gates = [0.5, 1.0, 0.0, 0.9, 1.0, 0.2]
    m = torch.tensor(gates, requires_grad=True)
    teacher = log_probabilities(model, BATCHES[1]).detach()
    with gated(model, m):
        divergence = (teacher.exp() * (teacher - log_probabilities(model, BATCHES[1]))).sum(-1).mean()
    (expected,) = torch.autograd.grad(divergence, m)
    with SearchProblem(model, Calibration(BATCHES, model.device), units=units_of(model, 2)) as problem:
        loss, slopes = gate_gradient(problem, gates, 1)
    assert loss == pytest.approx(divergence.item(), rel=1e-4)
    torch.testing.assert_close(torch.tensor(slopes), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    dense, head = problem.costs.stack, problem.costs.head
    assert problem.account.cost == pytest.approx(BATCHES[1].numel() * (3 * dense + 2 * head))


def test_concave_gates_are_a_valley():
    place = torch.tensor(2.0, dtype=torch.float64)
    cold = concave_gates(place, 3, 8, 0.05)
    torch.testing.assert_close(cold, torch.tensor([1, 1, 0, 0, 0, 1, 1, 1.0]).double(), rtol=0, atol=1e-3)
    soft = concave_gates(place, 3, 8, 2.0)
    assert soft.argmin() == 3
    torch.testing.assert_close(soft[:7], soft[:7].flip(0))


def test_clp_slides_downhill():
    """With the gradient turned round it ends elsewhere, on the way it stays among the layers that may go."""
    plan = run("clp", drop=2, protect=[0], steps=30)
    places = [record["place"] for record in plan.history]
    assert all(1 <= place <= NUM_LAYERS - 2 for place in places)
    assert len(set(places)) > 1
    first, last = (min(r["score"] for r in part) for part in (plan.history[:2], plan.history[2:]))
    assert last <= first


@pytest.mark.parametrize(
    ("curriculum", "counts"), [("cubic", [1, 7, 8, 8]), ("linear", [1, 4, 8, 8]), ("none", [8, 8, 8, 8])]
)
def test_the_curriculum_grows_to_all_layers(curriculum, counts):
    assert [removed_layers(8, progress, curriculum) for progress in (0.0, 0.3, 0.6, 0.99)] == counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "rmsprop"}, r"optimizer='rmsprop' must be one of adam, sgd"),
        ({"curriculum": "steep"}, r"curriculum='steep' must be one of"),
        ({"tau": 0.0}, r"tau=0.0"),
    ],
)
def test_straight_through_refuses_other_options(options, message):
    with pytest.raises(ValueError, match=message):
        run("straight-through", **options)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_straight_through_moves_the_logits_by_the_gradient_of_the_hard_mask(optimizer):
    plan = run("straight-through", drop=3, steps=12, optimizer=optimizer, lr=0.3)
    records = plan.history[1:]
    assert [record["drop"] for record in records][-1] == 3
    moved = [record["logits"] for record in records]
    assert all(a != b for a, b in pairwise(moved))
