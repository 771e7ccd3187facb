import pytest
from tiny_models import NUM_LAYERS, tiny_model

from e3pruner import prune
from e3pruner.evaluation import Speeds, layers_to_drop, target
from e3pruner.models import find_layers


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("fraction", "drop"), [(0.01, 1), (0.25, 2), (0.5, 3), (0.8, 5)])
def test_a_fraction_is_the_nearest_number_of_layers(fraction, drop):
    assert layers_to_drop(tiny_model("llama"), fraction=fraction) == drop


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_the_budget_of_parameters_is_met_whatever_goes(model_type):
    model = tiny_model(model_type)  # the layers of deepseek_v3 differ in size
    for kept in (5, 4, 2):
        largest = parameters(prune(model, list(range(NUM_LAYERS - kept, NUM_LAYERS))))
        drop = layers_to_drop(model, parameters=largest)
        for first in range(NUM_LAYERS - drop + 1):
            removed = set(range(first, first + drop))
            pruned = prune(model, [layer for layer in range(NUM_LAYERS) if layer not in removed])
            assert parameters(pruned) <= largest
    assert layers_to_drop(model, parameters=parameters(model) - 1) == 1


def test_the_time_of_a_token_is_measured_until_it_is_short_enough(monkeypatch):
    measured = []

    def clock(models):
        counts = {name: len(find_layers(model)) for name, model in models.items()}
        measured.extend(counts.values())
        rates = {name: 1000 / (4 + 2 * count + (count == 3)) for name, count in counts.items()}  # no straight line
        return Speeds({name: {"decode_tokens_per_s": rate} for name, rate in rates.items()}, {})

    monkeypatch.setattr(target, "speeds", clock)
    assert layers_to_drop(tiny_model("llama"), milliseconds=12.5) == 2
    assert measured == [6, 3, 3, 4, 5]
    measured.clear()
    assert layers_to_drop(tiny_model("llama"), milliseconds=10.5) == 4
    assert measured == [6, 3, 2, 3]
    with pytest.raises(ValueError, match="milliseconds=5 needs more than the 5 layers that may go"):
        layers_to_drop(tiny_model("llama"), milliseconds=5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"give one target of fraction, parameters, milliseconds, not 0"),
        ({"fraction": 0.5, "parameters": 1e3}, r"give one target .* not 2"),
        ({"fraction": 1.5}, r"fraction=1.5 must be between 0 and 1"),
        ({"fraction": 0.9, "protect": [0, 1]}, r"fraction=0.9 needs more than the 4 layers that may go"),
        ({"parameters": 1e12}, r"the model has .* already; nothing needs to go"),
        ({"parameters": 10}, r"parameters=10 needs more than the 5 layers"),
        ({"milliseconds": -1.0}, r"milliseconds=-1.0 must be finite"),
        ({"milliseconds": 1e9}, r"a token takes .* already"),
    ],
)
def test_targets_that_cannot_be_are_refused(given, message, monkeypatch):
    monkeypatch.setattr(target, "_milliseconds", lambda model, *drops: [10.0 - drop for drop in drops])
    with pytest.raises(ValueError, match=message):
        layers_to_drop(tiny_model("llama"), **given)


def test_of_sub_layers_a_fraction_counts_twice_as_many():
    model = tiny_model("llama")
    assert layers_to_drop(model, fraction=0.25, sublayers=True) == 3
    with pytest.raises(ValueError, match=r"fraction=0.9 needs more than the 8 sub-layers that may go"):
        layers_to_drop(model, fraction=0.9, protect=[0, 1], sublayers=True)
    with pytest.raises(ValueError, match=r"parameters=1000 counts whole layers; for sub-layers give drop or fraction"):
        layers_to_drop(model, parameters=1e3, sublayers=True)


@pytest.mark.parametrize(
    ("given", "number"),
    [({}, 8), ({"quota": {"mlp": 2, "attention": 1}}, 3), ({"drop": 5}, 5), ({"fraction": 0.5}, 3)],
    ids=str,
)
def test_without_a_target_eight_or_the_quota_go(given, number):
    assert target.number_to_drop(tiny_model("llama"), **given) == number
