"""Differences in pairs: what two models have in common cancels."""

import pytest
import torch
from tiny_models import NUM_LAYERS, tiny_model, tiny_tokens

import e3pruner
from e3pruner.evaluation.paired import paired


def test_what_the_sequences_share_cancels():
    hard = torch.randn(40, generator=torch.Generator().manual_seed(0)).exp()
    these, those = {"a": (hard + 0.1).tolist(), "b": [1.0, 2.0]}, {"a": hard.tolist(), "b": [1.1, 1.9]}
    found = paired(these, those)
    assert found.mean == pytest.approx((0.1 + 0.0) / 2)
    assert found.error == pytest.approx(0.1 / 2, rel=1e-3)  # of the two pairs of "b" alone
    assert str(found) == "+0.050 ± 0.050"
    assert paired({"a": [1.0]}, {"a": [0.5]}) == (0.5, None)
    with pytest.raises(ValueError, match="same kinds"):
        paired(these, {"a": those["a"]})
    with pytest.raises(ValueError, match="40 and 3 sequences of 'a' make no pairs"):
        paired(these, those | {"a": [1.0, 2.0, 3.0]})


def test_the_figures_of_sequences_are_those_of_the_sequences():
    model = tiny_model("llama")
    pruned = e3pruner.prune(model, list(range(NUM_LAYERS - 2)))
    ids = tiny_tokens(5)
    found = e3pruner.evaluate(pruned, ids.split(2), model, by_sequence=True, progress=False)
    alone = [e3pruner.evaluate(pruned, row, model, progress=False) for row in ids.split(1)]
    for name in ("kl", "perplexity", "top1_agreement", "tokens"):
        assert found["sequences"][name] == pytest.approx([each[name] for each in alone], rel=1e-5)
    whole = e3pruner.evaluate(pruned, ids.split(2), model, progress=False)
    assert "sequences" not in whole
    assert {name: found[name] for name in whole} == pytest.approx(whole, rel=1e-6)
