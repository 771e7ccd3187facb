import importlib
from types import SimpleNamespace

import pytest
from tiny_models import tiny_model

from e3pruner.evaluation import latency


def test_speeds_follow_from_the_times_generate_takes(monkeypatch):
    """With a clock that ticks once a call, each token takes one second."""
    ticks = iter(range(10**6))
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(importlib.import_module("e3pruner.evaluation.latency"), "time", clock)
    model = tiny_model("llama")
    lengths = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    latency(model, prompt_tokens=8, new_tokens=2, repeats=1)
    lengths.clear()
    assert latency(model, prompt_tokens=8, new_tokens=5, repeats=2) == {
        "prefill_tokens_per_s": 8.0,
        "decode_tokens_per_s": 1.0,
    }
    assert lengths == [8, 1] + 2 * [8, 1, 1, 1, 1]


@pytest.mark.parametrize("wrong", [{"prompt_tokens": 0}, {"new_tokens": 1}, {"repeats": 0}])
def test_counts_are_checked(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}={wrong[name]}"):
        latency(tiny_model("llama"), **wrong)
