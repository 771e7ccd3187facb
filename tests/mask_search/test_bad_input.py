import pytest
import torch
from tiny_models import NUM_LAYERS, VOCAB_SIZE, tiny_model, tiny_tokens

import e3kernels
import e3pruner
from e3pruner.models.device import rounded_dtype


@pytest.fixture
def untouched(monkeypatch):
    """A model on which any forward pass fails the test: errors must come before work."""
    model = tiny_model("llama")
    e3pruner.models.output_head(model)
    rounded_dtype(model, "auto")  # what is known of a model once and for all
    monkeypatch.setattr(type(model.model), "forward", lambda *_, **__: pytest.fail("the model ran"))
    return model


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"drop": 0}, ValueError, r"drop=0 must be from 1 to 5"),
        ({"drop": -1}, ValueError, r"drop=-1"),
        ({"drop": NUM_LAYERS}, ValueError, r"drop=6 must be from 1 to 5: the model has 6 layers"),
        ({"drop": 2.0}, TypeError, r"drop must be an integer"),
        ({"drop": True}, TypeError, r"drop must be an integer"),
        ({"protect": [0, 1, 2, 3, 4]}, ValueError, r"protect names 5 layers, drop=2"),
        ({"protect": [6]}, ValueError, r"protect holds 6"),
        ({"method": "magic"}, ValueError, r"method='magic'.*gumbel-topk"),
        ({"method": "greedy", "steps": 3}, TypeError, r"steps is no option of method='greedy'"),
        ({"method": "gumbel-topk", "problem": 3}, TypeError, r"problem is no option"),
        ({"steps": 0}, ValueError, r"steps=0"),
        ({"samples": 1}, ValueError, r"samples=1"),
        ({"seed": -1}, ValueError, r"seed=-1"),
        ({"precision": "fp8"}, ValueError, r"precision='fp8'"),
        ({"token_batches": []}, ValueError, r"token_batches is empty"),
        ({"token_batches": [torch.empty(0, 4).long()]}, ValueError, r"token_batches\[0\] has shape \(0, 4\)"),
        ({"token_batches": [[[3, 4, 5], [3, 4]]]}, ValueError, r"token_batches\[0\] is no rectangular batch"),
        ({"token_batches": [tiny_tokens(2, 8), tiny_tokens(2, 6)]}, ValueError, r"\[1\] has 6 tokens per sequence"),
        ({"token_batches": [tiny_tokens()[0]]}, ValueError, r"has shape \(12,\)"),
        ({"token_batches": [tiny_tokens().float()]}, ValueError, r"dtype torch.float32"),
        ({"token_batches": [tiny_tokens(), tiny_tokens() + VOCAB_SIZE]}, ValueError, r"\[1\] holds token .* 0 to 98"),
        ({"token_batches": [-tiny_tokens()]}, ValueError, r"holds token -\d+"),
    ],
)
def test_errors_name_the_argument_before_any_work(untouched, arguments, error, message):
    with pytest.raises(error, match=message):
        e3pruner.search(untouched, **{"token_batches": [tiny_tokens()], "drop": 2, "progress": False} | arguments)


def test_nan_stops_the_search_and_names_the_step(monkeypatch, tmp_path):
    model, checkpoint = tiny_model("llama"), tmp_path / "search.json"
    arguments = {"drop": 2, "progress": False, "checkpoint": checkpoint}
    expected = e3pruner.search(model, [tiny_tokens()], **arguments | {"checkpoint": None})
    real, calls = e3kernels.entropy_kl, []

    def sometimes_nan(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (float("nan") if len(calls) == NUM_LAYERS + 2 else 1)

    monkeypatch.setattr(e3kernels, "entropy_kl", sometimes_nan)
    with pytest.raises(FloatingPointError, match=r"search step 1: the KL is nan on batch 0 without layers \["):
        e3pruner.search(model, [tiny_tokens()], **arguments)
    assert e3pruner.search(model, [tiny_tokens()], **arguments) == expected
