"""The stages of a run: computed once, kept, and not trusted when damaged."""

import pytest
import torch

from e3pruner.pipelines.stages import Stages


def test_a_stage_is_computed_once(tmp_path):
    stages, calls = Stages(tmp_path, torch.float32), []

    def compute():
        calls.append(1)
        return {"removed": [1, 2], "kl": 0.25}

    first = stages.stage("1-search", compute)
    assert stages.stage("1-search", compute) == first == {"removed": [1, 2], "kl": 0.25}
    assert calls == [1]
    assert list(stages.seconds()) == ["1-search"]
    stages.clear()
    assert stages.seconds() == {}


@pytest.mark.parametrize(
    "damage",
    [lambda text: text.replace("0.25", "0.35"), lambda text: text[:-9], lambda text: "[" * 100_000, lambda text: "[]"],
)
def test_a_damaged_stage_is_named(tmp_path, damage):
    stages = Stages(tmp_path, torch.float32)
    stages.stage("1-search", lambda: {"removed": [1, 2], "kl": 0.25})
    file = tmp_path / "stage-1-search.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match=r"stage-1-search\.json .*; delete it to repeat the stage, or use --force"):
        stages.stage("1-search", lambda: None)
