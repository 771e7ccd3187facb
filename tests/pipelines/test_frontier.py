"""Several depths in one run: a plan for each, what it costs, and the one that a ratio of perplexities picks."""

import importlib
import json

import pytest
from tiny_models import tiny_model, tiny_tokens

import e3pruner
from e3pruner.evaluation import Speeds
from e3pruner.pipelines import frontier
from e3pruner.pipelines.frontier import deepest, frontier_results, parse_drops, usual_drops

BATCHES = [tiny_tokens(seed=seed) for seed in range(2)]
HELD_OUT, UNSEEN = [tiny_tokens(4, seed=5)], [tiny_tokens(4, seed=6)]
QUICK = {"speed": False, "precision": "fp32", "progress": False}


@pytest.fixture(scope="module")
def found():
    return frontier(tiny_model("llama"), BATCHES, [1, 2, 4], HELD_OUT, UNSEEN, **QUICK)


def test_each_depth_has_its_plan_and_the_figures_of_its_model(found):
    model, (dense, points) = tiny_model("llama"), found
    assert [point.drop for point in points] == [1, 2, 4]
    assert dense["kl"] == pytest.approx(0, abs=1e-5)
    for point in points:
        pruned = e3pruner.prune(model, point.plan)
        expected = e3pruner.evaluate(pruned, HELD_OUT, model, precision="auto", progress=False)
        assert point.figures["kl"] == pytest.approx(expected["kl"], rel=1e-3)
        assert point.figures["parameters"] == sum(p.numel() for p in pruned.parameters())
        assert point.ratio == pytest.approx(point.figures["unseen_perplexity"] / dense["unseen_perplexity"])


def test_a_depth_starts_from_the_plan_of_the_one_before(found):
    _, points = found
    finalists = next(record["finalists"] for record in points[2].plan.history if "finalists" in record)
    assert any(set(points[1].plan.removed) <= set(units) for units in finalists)
    with pytest.raises(ValueError, match=r"warm names \[9\]; the model has the units 0 to 5"):
        e3pruner.search(tiny_model("llama"), BATCHES, 2, warm=[[9]], progress=False)


def test_what_one_depth_has_measured_the_next_does_not_measure_again(found, tmp_path):
    _, points = frontier(
        tiny_model("llama"), BATCHES, [1, 2, 4], HELD_OUT, UNSEEN, checkpoint=tmp_path / "known.json", **QUICK
    )
    assert [point.plan for point in points] == [point.plan for point in found[1]]
    known = json.loads((tmp_path / "known.json").read_text())["measured"]
    assert {mask.count("0") for key in known if key.startswith("kl ") and (mask := key.split()[2])} == {1, 2, 4}


def test_the_ratio_picks_the_deepest_that_keeps_to_it(found):
    _, points = found
    ratios = sorted(point.ratio for point in points)
    assert deepest(points, ratios[-1] + 1).drop == 4
    allowed = points[1].ratio
    assert deepest(points, allowed) == max((p for p in points if p.ratio <= allowed), key=lambda p: p.drop)
    with pytest.raises(ValueError, match=r"max_perplexity_ratio=0.01: the least is .*, with \d layers removed"):
        deepest(points, 0.01)


def test_depths_are_read_and_chosen():
    assert parse_drops(None) == []
    assert parse_drops("4, 8,12") == parse_drops([4, 8, 12]) == [4, 8, 12]
    assert parse_drops(8) == parse_drops("8") == [8]
    for wrong in ("8,4", "4,4", "4,x", "", "0"):
        with pytest.raises(ValueError, match="drop="):
            parse_drops(wrong)
    assert usual_drops(tiny_model("llama")) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"drops=\[2, 1\] must be numbers of layers that rise"):
        frontier(tiny_model("llama"), BATCHES, [2, 1], HELD_OUT)


def test_depths_are_timed_in_turns(monkeypatch):
    asked = []
    monkeypatch.setattr(
        importlib.import_module("e3pruner.pipelines.frontier"),
        "speeds",
        lambda models: (
            asked.append(list(models))
            or Speeds({name: {"decode_tokens_per_s": 9.0} for name in models}, {"doubts": ["busy"]})
        ),
    )
    dense, points = frontier(tiny_model("llama"), BATCHES, [1, 2], HELD_OUT, **(QUICK | {"speed": True}))
    assert asked == [["dense", "1", "2"]]
    assert points[1].figures["decode_tokens_per_s"] == 9
    results = frontier_results(dense, points)
    assert results["timing"] == {"doubts": ["busy"]}
    assert all("timing" not in row for row in results["models"])
