import importlib
from types import SimpleNamespace

import pytest
from tiny_models import tiny_model

from e3pruner.evaluation import latency, speeds

module = importlib.import_module("e3pruner.evaluation.latency")


@pytest.fixture
def seconds(monkeypatch):
    """A clock that ticks once a call, and an attribute `tick` that says by how much."""
    clock = SimpleNamespace(now=0.0, tick=1.0)

    def perf_counter():
        clock.now += clock.tick
        return clock.now

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=perf_counter))
    return clock


def passes_of(models):
    """The name of a model and the tokens of each of its forward passes, as they come."""
    seen = []
    for name, model in models.items():
        model.model.layers[0].register_forward_pre_hook(
            lambda _, args, name=name: seen.append((name, args[0].shape[1]))
        )
    return seen


def test_speeds_follow_from_the_times_generate_takes(seconds):
    model = tiny_model("llama")
    latency(model, prompt_tokens=8, new_tokens=2, repeats=1, limit=0)  # the first call traces the layers
    lengths = passes_of({"one": model})
    assert latency(model, prompt_tokens=8, new_tokens=5, repeats=3, limit=0) == {
        "prefill_tokens_per_s": 8.0,
        "prefill_quartiles": [8.0, 8.0],
        "decode_tokens_per_s": 1.0,
        "decode_quartiles": [1.0, 1.0],
        "rounds": 3,
    }
    assert [length for _, length in lengths] == 4 * [8, 1, 1, 1, 1]  # a round that does not count, and three


def test_models_take_turns(seconds):
    """One after the other, they used to be measured while the machine was another."""
    models = {name: tiny_model("llama") for name in ("dense", "pruned")}
    seen = passes_of(models)
    found = speeds(models, prompt_tokens=4, new_tokens=2, repeats=3, limit=0)
    assert found.of["dense"] == found.of["pruned"]
    turns = [name for name, length in seen if length == 4]
    assert all(set(turns[start : start + 2]) == set(models) for start in range(0, 8, 2))


def test_a_speed_that_scatters_is_measured_on_and_said(seconds):
    model = tiny_model("llama")
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args: setattr(seconds, "tick", 1 + int(seconds.now) % 7)  # seconds as on a busy machine
    )
    found = speeds({"dense": model}, prompt_tokens=4, new_tokens=5, repeats=3)
    assert found.of["dense"]["rounds"] == 15
    low, high = found.of["dense"]["decode_quartiles"]
    assert low < high
    (doubt,) = [doubt for doubt in found.timing["doubts"] if doubt.startswith("dense, writing")]
    assert doubt.endswith("% only, after 15 rounds: measure again, with nothing else at work")
    assert {"load_average", "cores_of_others", "mhz", "seconds"} <= found.timing.keys()


@pytest.mark.parametrize("wrong", [{"prompt_tokens": 0}, {"new_tokens": 1}, {"repeats": 0}])
def test_counts_are_checked(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}={wrong[name]}"):
        latency(tiny_model("llama"), **wrong)
