import importlib
import itertools
import json
import re
import subprocess
import sys

import pytest
import torch
from mask_search.conftest import QUICK
from tiny_models import NUM_LAYERS, TINY_CONFIGS, tiny_model, tiny_tokens

import e3pruner
from e3pruner.mask_search import METHODS
from e3pruner.mask_search.account import PassCosts
from e3pruner.mask_search.calibration import Calibration
from e3pruner.mask_search.methods.policy_gradient import plackett_luce_gradient
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.units import units_of
from e3pruner.models import output_head, skipped

BATCHES = [tiny_tokens(seed=seed) for seed in range(2)]


def run(method, model=None, **arguments):
    arguments = {"drop": 2, "progress": False} | QUICK.get(method, {}) | arguments
    return e3pruner.search(model or tiny_model("llama"), BATCHES, method=method, **arguments)


def plain_kl(model, removed):
    """Mean KL by two plain forward passes, in fp64."""
    divergences = []
    for ids in BATCHES:
        with torch.no_grad():
            teacher = model(ids, use_cache=False).logits.double().log_softmax(-1)
            with skipped(model, removed):
                student = model(ids, use_cache=False).logits.double().log_softmax(-1)
        divergences.append((teacher.exp() * (teacher - student)).sum(-1))
    return torch.cat(divergences).mean().item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("drop", [1, 3, NUM_LAYERS - 2])
def test_every_method_removes_exactly_what_it_should(method, drop):
    plan = run(method, drop=drop, protect=[0, 5], precision="fp32")
    assert len(plan.removed) == drop
    assert plan.kept == sorted(set(range(NUM_LAYERS)) - set(plan.removed))
    assert not {0, 5} & set(plan.removed)
    assert (plan.method, plan.seed, plan.model_type) == (method, 0, "llama")
    assert plan.metrics["tokens"] == sum(batch.numel() for batch in BATCHES)
    assert plan.metrics["kl"] == pytest.approx(plain_kl(tiny_model("llama"), plan.removed), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_history_is_complete_and_json(method):
    plan = run(method)
    assert json.loads(json.dumps(plan.history)) == plan.history
    assert [record["step"] for record in plan.history] == list(range(len(plan.history)))
    costs = [record["cost"] for record in plan.history]
    assert costs == sorted(costs)
    assert costs[-1] == plan.metrics["cost"]
    assert sorted(plan.history[-1]["removed"]) == plan.removed


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides(method):
    assert run(method, seed=3) == run(method, seed=3)


def test_random_depends_on_the_seed():
    assert len({tuple(run("random", seed=seed, drop=3).removed) for seed in range(8)}) > 1


def test_last_n_takes_the_deepest_that_may_go():
    assert run("last-n", protect=[NUM_LAYERS - 1]).removed == [NUM_LAYERS - 3, NUM_LAYERS - 2]


def test_leave_one_out_is_the_kl_without_one_layer():
    model = tiny_model("gpt2")
    plan = run("leave-one-out", model, precision="fp32")
    expected = [plain_kl(model, [layer]) for layer in range(NUM_LAYERS)]
    assert plan.history[0]["importance"] == pytest.approx(expected, rel=1e-4)
    assert plan.removed == sorted(sorted(range(NUM_LAYERS), key=expected.__getitem__)[:2])


def test_bi_is_one_minus_the_cosine_of_input_and_output():
    model = tiny_model("llama")
    cosines = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, args, out: cosines.append(torch.cosine_similarity(args[0].double(), out.double(), dim=-1).mean())
        )
    with torch.no_grad():
        for ids in BATCHES:
            model(ids, use_cache=False)
    influence = 1 - torch.stack(cosines).view(len(BATCHES), NUM_LAYERS).mean(0)
    plan = run("bi", precision="fp32")
    assert plan.history[0]["importance"] == pytest.approx(influence.tolist(), rel=1e-4)
    assert plan.removed == sorted(influence.argsort()[:2].tolist())


def test_cost_counts_layers_and_heads_by_their_share_of_the_parameters():
    model = tiny_model("llama")
    tokens = sum(batch.numel() for batch in BATCHES)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel()
    dense = NUM_LAYERS * layer + head
    assert run("bi", model).metrics["cost"] == pytest.approx(tokens * NUM_LAYERS * layer / dense)
    # The dense model; the first mask, which lacks the last layer; then each lacks layer l and runs those after it.
    runs = NUM_LAYERS + (NUM_LAYERS - 1) + sum(range(NUM_LAYERS))
    cost = run("leave-one-out", model).metrics["cost"]
    assert cost == pytest.approx(tokens * (runs * layer + NUM_LAYERS * head) / dense)


def test_angular_takes_the_run_of_layers_that_turns_the_hidden_state_least():
    model = tiny_model("llama")
    angles = []
    for ids in BATCHES:
        with torch.no_grad():
            states = list(model(ids, use_cache=False, output_hidden_states=True).hidden_states)
        cosines = [torch.cosine_similarity(states[i].double(), states[i + 3].double(), dim=-1) for i in range(3)]
        angles.append(torch.stack([cosine.arccos().mean() / torch.pi for cosine in cosines]))
    plan = run("angular", drop=3, precision="fp32")
    assert plan.history[0]["scores"][:3] == pytest.approx(torch.stack(angles).mean(0).tolist(), rel=1e-4)
    best = min(range(NUM_LAYERS - 2), key=plan.history[0]["scores"].__getitem__)
    assert plan.removed == [best, best + 1, best + 2]


@pytest.mark.parametrize("method", ["angular", "clp", "contiguous"])
def test_a_run_needs_neighbours(method):
    with pytest.raises(ValueError, match="protect leaves no 2 neighbouring layers"):
        run(method, protect=[1, 3, 5])


def test_evolution_never_gets_worse_on_one_batch():
    plan = e3pruner.search(tiny_model("llama"), BATCHES[:1], 3, "evolution", progress=False)
    scores = [record["score"] for record in plan.history]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < scores[0]


def test_plackett_luce_gradient_is_that_of_the_log_probability():
    logits = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    log_probability = sum(logits[order[i]] - logits[order[i:]].logsumexp(0) for i in range(4))
    (expected,) = torch.autograd.grad(log_probability, logits)
    torch.testing.assert_close(plackett_luce_gradient(logits.detach(), order, 4), expected)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_gumbel_topk_finds_the_best_of_all_masks(model_type):
    model = tiny_model(model_type)
    plan = run("gumbel-topk", model, drop=3, precision="fp32")
    every = itertools.combinations(range(NUM_LAYERS), 3)
    assert tuple(plan.removed) == min(every, key=lambda removed: plain_kl(model, removed))


def test_greedy_is_brute_force_one_layer_at_a_time():
    model = tiny_model("llama")
    removed = []
    for _ in range(3):
        left = [layer for layer in range(NUM_LAYERS) if layer not in removed]
        removed.append(min(left, key=lambda layer: plain_kl(model, [*removed, layer])))
    assert run("greedy", drop=3, precision="fp32").removed == sorted(removed)


def state(model):
    forwards = [vars(module).get("forward") for module in model.modules()]
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return forwards, flags, hooks


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_bf16_orders_the_layers_of_every_model_type_almost_as_fp32(model_type):
    model = tiny_model(model_type)
    full, half = (run("leave-one-out", model, precision=p).history[0]["importance"] for p in ("fp32", "bf16"))
    assert full != half
    assert half == pytest.approx(full, rel=0.2, abs=0.02)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", ["gumbel-topk", "bi"])
def test_the_model_is_left_as_it_was(method, fails):
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    weights = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}
    before = state(model)
    if fails:
        model.model.norm.register_forward_pre_hook(lambda *_: exec("raise RuntimeError('from the model')"))
        before = state(model)
        with pytest.raises(RuntimeError, match="from the model"):
            run(method, model)
    else:
        run(method, model)
    assert state(model) == before
    for name, tensor in model.state_dict().items():
        own, values = weights[name]
        assert tensor.data_ptr() == own.data_ptr()
        assert torch.equal(tensor, values)


@pytest.mark.parametrize("first", ["e3pruner", "e3pruner.mask_search.methods.bi"])
def test_search_is_a_function_whatever_is_imported_first(first):
    code = f"import {first}, e3pruner; from e3pruner.mask_search.methods.bi import bi\n"
    code += "import e3pruner.mask_search.methods.greedy; from e3pruner.mask_search import METHODS\n"
    code += "print(callable(e3pruner.search), METHODS['bi'] is bi)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
    assert importlib.import_module("e3pruner.mask_search.methods.bi").bi is METHODS["bi"]


@pytest.mark.parametrize("method", ["gumbel-topk", "greedy", "evolution"])
def test_the_progress_bar_ends_full(method, capsys):
    run(method, progress=True)
    done, total = re.findall(r"(\d+)/(\d+)", capsys.readouterr().err)[-1]
    assert int(done) > 0
    assert done == total


@pytest.mark.parametrize("method", ["gumbel-topk", "greedy", "evolution"])
def test_a_search_runs_no_more_than_it_pays_for(method, monkeypatch):
    """Tokens through layers, the few of the proof apart: no dense pass is made twice."""
    monkeypatch.setattr(PassCosts, "of", lambda layers, *_: PassCosts([1 / len(layers)] * len(layers), 0.0, 1))
    model, tokens = tiny_model("llama"), []
    for layer in e3pruner.find_layers(model):
        layer.mlp.register_forward_hook(lambda _, args, output: tokens.append(output[..., 0].numel()))
    output_head(model)  # checks the model's head with passes of its own, once
    tokens.clear()
    plan = run(method, model)
    paid, proof = plan.metrics["cost"] * NUM_LAYERS, 10 * NUM_LAYERS * 8
    assert paid <= sum(tokens) + 1e-6 <= paid + proof


def test_a_fraction_is_a_number_of_layers():
    assert run("bi", drop=None, fraction=0.5, protect=[1]) == run("bi", drop=3, protect=[1])
    plan = run("random", drop=None, fraction=0.25, granularity="sublayer")
    assert 2 * len(plan.removed) + sum(map(len, plan.sublayers.values())) == 3
    with pytest.raises(ValueError, match=r"drop=2 is one target, fraction=0\.5 another"):
        run("bi", fraction=0.5)


def deep_model(seed, layers=12):
    """A llama of more layers, whose neighbours do much the same: that removes best which looks worst alone."""
    model = tiny_model("llama", seed, num_hidden_layers=layers)
    with torch.no_grad():
        stack = e3pruner.find_layers(model)
        for before, layer in itertools.pairwise(stack):
            for old, new in zip(before.parameters(), layer.parameters(), strict=True):
                new.copy_(0.9 * old + 0.436 * new)
        for layer in stack:
            for name, parameter in layer.named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    parameter.mul_(0.3)
    return model


def test_more_text_means_more_steps_until_nothing_better_is_expected():
    model, plans = deep_model(0), []
    for rows in (4, 32):
        batches = tiny_tokens(rows, 64, seed=3).split(4)
        plans.append(e3pruner.search(model, batches, 4, precision="fp32", progress=False))
        (step, *_, last) = (record for record in plans[-1].history if "expected_gain" in record)
        assert step["expected_gain"] > last["expected_gain"]
    few, many = ([record for record in plan.history if "expected_gain" in record] for plan in plans)
    assert len(few) <= 12 < 40  # three for each layer that goes; of 32 rows 0.15 of greedy's cost would be more
    assert many[-1]["expected_gain"] < 0.0005 or len(many) > len(few)
    endless = e3pruner.search(model, batches, 4, steps=30, tolerance=0.0, precision="fp32", progress=False)
    assert sum("expected_gain" in record for record in endless.history) == 30
    assert many[-1]["cost"] < endless.metrics["cost"]


@pytest.mark.parametrize("seed", range(3))
def test_no_exchange_of_the_choice_is_better_on_all_of_the_text(seed):
    model, batches = deep_model(seed), tiny_tokens(16, 64, seed=seed).split(4)
    plan = e3pruner.search(model, batches, 4, precision="fp32", progress=False)
    swaps = [
        sorted({*plan.removed} - {back} | {gone})
        for back in plan.removed
        for gone in range(12)
        if gone not in plan.removed
    ]
    calibration = Calibration(list(batches), model.device)
    with SearchProblem(model, calibration, units=units_of(model, 4)) as problem:
        scores = problem.score([problem.mask(units) for units in swaps])
    assert plan.metrics["kl"] <= min(scores) * 1.01


def test_a_run_whose_layers_only_undo_each_other_is_found():
    """Alone each of the three is among the dearest to remove; together they are removed for nothing."""
    model = tiny_model("llama", num_hidden_layers=10)
    shift = torch.randn(32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for share, layer in zip((2, -1, -1), e3pruner.find_layers(model)[4:7], strict=True):
            for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
                matrix.weight.zero_()
                matrix.bias.zero_()
            layer.mlp.down_proj.bias.copy_(20 * share * shift)
    alone = run("leave-one-out", model, drop=3, precision="fp32")
    assert not {4, 5, 6} & set(alone.removed)
    plan = run("gumbel-topk", model, drop=3, precision="fp32")
    assert plan.removed == [4, 5, 6]
    assert plan.metrics["kl"] == pytest.approx(0, abs=1e-5)
