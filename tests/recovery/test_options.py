import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3pruner.recovery import DistillOptions


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"accumulation": -1},
        {"eval_every": 0},
        {"save_every": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"max_grad_norm": -1.0},
        {"temperature": float("inf")},
        {"warmup": 1.5},
        {"kd_ratio": -0.1},
        {"weight_decay": -1.0},
        {"gamma": float("nan")},
        {"lora_rank": 0},
        {"spike": 1.0},
        {"ema": 1.0},
        {"weighting": "entropic"},
        {"divergence": "backward"},
        {"trainable": "head"},
        {"precision": "fp16"},
    ],
)
def test_illegal_values_are_named(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"^{name}={value!r} must"):
        DistillOptions(**bad)


def test_mix_sets_the_ratio_itself():
    with pytest.raises(ValueError, match=r"kd_ratio=0.5 must be 1 with weighting='mix'"):
        DistillOptions(weighting="mix", kd_ratio=0.5)
    assert DistillOptions(weighting="mix", kd_ratio=1.0).kd_ratio == 1.0


@given(steps=st.integers(1, 300), warmup=st.floats(0, 1))
def test_the_learning_rate_rises_to_its_peak_and_falls_by_a_cosine(steps, warmup):
    options = DistillOptions(lr=1.0, warmup=warmup)
    rates = [options.learning_rate(step, steps) for step in range(steps)]
    peak = max(round(warmup * steps) - 1, 0)
    assert rates[peak] == max(rates) == 1.0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) > 0
