"""The healed objective: what a short recovery says decides, within a budget that is stated first."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tiny_models import NUM_LAYERS, tiny_model, tiny_tokens

import e3pruner
from e3pruner.mask_search import healed
from e3pruner.mask_search.calibration import Calibration
from e3pruner.mask_search.healed import candidates, parse_rungs
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import removed_units
from e3pruner.mask_search.study import Study
from e3pruner.mask_search.units import units_of
from e3pruner.surgery import PruningPlan

CALIBRATION = [tiny_tokens(4, seed=seed) for seed in range(2)]
TRAINING = tiny_tokens(16, seed=9)
RUNGS = "4x96,3x192"
HEALED = {"objective": "healed", "training": TRAINING, "rungs": RUNGS, "recover": {"lr": 1e-3}, "precision": "fp32"}


def search(model=None, batches=CALIBRATION, **changes):
    arguments = {"drop": 2, "progress": False} | HEALED | changes
    return e3pruner.search(model or tiny_model("llama"), batches, **arguments)


@pytest.fixture(scope="module")
def plan():
    return search()


def test_the_choice_is_the_mask_whose_recovered_model_is_best(plan):
    model = tiny_model("llama")
    rungs = [record for record in plan.history if "healed" in record]
    assert [(len(record["masks"]), record["tokens"]) for record in rungs] == [(4, 96), (3, 192)]
    last = rungs[-1]
    for removed, before, after in zip(last["masks"], last["cut"], last["healed"], strict=True):
        kept = [layer for layer in range(NUM_LAYERS) if layer not in removed]
        student = e3pruner.prune(model, kept)
        figures = e3pruner.evaluate(student, CALIBRATION, model, progress=False)
        assert before == pytest.approx(figures["kl"], rel=1e-3)
        e3pruner.distill(student, teacher=model, data=TRAINING, steps=16, batch_size=1, lr=1e-3, precision="fp32")
        figures = e3pruner.evaluate(student, CALIBRATION, model, progress=False)
        assert after == pytest.approx(figures["kl"], rel=0.02)
    assert plan.removed == last["masks"][last["healed"].index(min(last["healed"]))]
    assert plan.metrics["healed_kl"] == min(last["healed"])
    assert plan.metrics["healed_tokens"] == 192


def test_the_model_is_as_it_was_and_the_seed_decides(plan):
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert search(model) == plan
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_it_costs_is_said_before_and_is_not_exceeded(plan, capfd):
    raw = e3pruner.search(tiny_model("llama"), CALIBRATION, 2, precision="fp32", progress=False)
    said = search(progress=True)
    assert said == plan
    line = " ".join(capfd.readouterr().err.split())
    assert "recoveries: 4 masks on 96 tokens, then 3 masks on 192 tokens" in line
    budget = float(line.partition("960 tokens of training, ")[2].partition(" token-passes")[0].replace(",", ""))
    spent = plan.metrics["cost"] - raw.metrics["cost"]
    # The prior of the values may have to be measured on a batch more.
    assert 0.9 * budget < spent < 1.1 * budget


def test_an_interrupted_search_repeats_no_recovery(plan, tmp_path, monkeypatch):
    trained = []
    distill = healed.distill

    def counting(student, **arguments):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(arguments["steps"])
        return distill(student, **arguments)

    monkeypatch.setattr(healed, "distill", counting)
    with pytest.raises(KeyboardInterrupt):
        search(checkpoint=tmp_path / "search.json")
    trained[:] = []
    monkeypatch.setattr(
        healed, "distill", lambda student, **arguments: trained.append(1) or distill(student, **arguments)
    )
    assert search(checkpoint=tmp_path / "search.json") == plan
    assert len(trained) == 4 - 3 + 3
    search(checkpoint=tmp_path / "search.json")
    assert len(trained) == 4 - 3 + 3


def test_candidates_hold_runs_of_neighbours_and_differ():
    model = tiny_model("llama")
    problem = SearchProblem(model, Calibration(CALIBRATION, model.device), units=units_of(model, 2))
    with problem:
        problem.score([problem.mask([a, b]) for a in range(6) for b in range(a)])
        study = Study.of_measured(problem)
    chosen = [removed_units(problem, mask) for mask in candidates(study, [[0, 3]], 8)]
    assert chosen[0] == [0, 3]
    assert len(chosen) == len({tuple(units) for units in chosen}) == 8
    assert sum(b - a == 1 for a, b in chosen) >= 2


def test_two_ranks_train_a_mask_each_and_choose_as_one(plan, tmp_path, monkeypatch):
    trained, distill = [], healed.distill
    monkeypatch.setattr(
        healed, "distill", lambda student, **arguments: trained.append(1) or distill(student, **arguments)
    )

    def share():
        rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        found = search(batches=[batch[rows] for batch in CALIBRATION])
        assert len(trained) in (3, 4)  # of 7
        found.save(tmp_path / f"{dist.get_rank()}.json")

    on_ranks(2, share, tmp_path)
    first, second = (PruningPlan.load(tmp_path / f"{rank}.json") for rank in (0, 1))
    assert first == second
    assert first.metrics["healed_kl"] == pytest.approx(plan.metrics["healed_kl"], rel=1e-3)
    assert first.removed == plan.removed


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"objective": "best"}, ValueError, r"objective='best' must be one of raw, healed"),
        ({"training": None}, ValueError, r"objective='healed' needs training"),
        ({"objective": "raw"}, ValueError, r"training and recover are of objective='healed', not 'raw'"),
        ({"rungs": "4x96,8x192"}, ValueError, r"rungs='4x96,8x192' must have fewer masks and more tokens"),
        ({"rungs": "many"}, ValueError, r"rungs='many' must be MASKSxTOKENS"),
        ({"rungs": "4x9600"}, ValueError, r"rungs='4x9600': training has 192 tokens, fewer than 9,600"),
        ({"rungs": "4x6"}, ValueError, r"rungs='4x6': 6 tokens are no step of 12 tokens"),
        ({"recover": {"steps": 3}}, ValueError, r"recover=.*: steps follow from the tokens of a rung"),
        ({"recover": {"learning": 3}}, TypeError, r"learning is no option of recover"),
        ({"recover": {"lr": -1.0}}, ValueError, r"lr=-1.0 must be finite"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_before_anything_is_measured(changes, error, message):
    model = tiny_model("llama")
    whole = len(CALIBRATION[0])  # whether a model can run on text, a row says
    model.model.layers[0].register_forward_pre_hook(
        lambda _, given: pytest.fail("the model was run") if len(given[0]) == whole else None
    )
    with pytest.raises(error, match=message):
        search(model, **changes)


def test_rungs_are_read():
    assert parse_rungs(" 16x4096, 8x8192 ") == [(16, 4096), (8, 8192)]
