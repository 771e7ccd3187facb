"""`e3 plan`: what can be done with a model is known without its weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import NUM_LAYERS, tiny_model
from tiny_vision_models import tiny_vision_model
from transformers import BartConfig, PreTrainedModel
from typer.testing import CliRunner

from e3pruner.cli import app
from e3pruner.pipelines.outlook import outlook

DONE = ("search", "prune", "distill")


def described(model: PreTrainedModel, folder: Path) -> str:
    """A folder with a configuration and nothing else."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("model_type", "changes", "may", "why", "runtime"),
    [
        ("llama", {}, True, "6 layers may go", True),
        ("qwen3_moe", {}, True, "6 layers may go", True),
        ("qwen3_next", {}, True, "one of the layers that attend (1, 3, 5) must stay", False),
        ("gemma2", {"layer_types": ["sliding_attention", "full_attention"] * 3}, True, "6 layers may go", True),
    ],
)
def test_a_configuration_tells_what_can_be_done(
    model_type: str, changes: dict[str, Any], may: bool, why: str, runtime: bool, tmp_path: Path
) -> None:
    found = outlook(described(tiny_model(model_type, **changes), tmp_path))
    assert (found.model_type, found.layers) == (model_type, NUM_LAYERS)
    assert [found.answers[name].yes for name in DONE] == [may] * 3
    assert why in found.answers["prune"].why
    assert found.answers["runtime"].yes is runtime
    rule = "quota='llama.cpp'" in found.answers["llama.cpp"].why
    assert rule is (model_type == "gemma2")


def test_the_text_tower_of_an_image_text_model_is_meant(tmp_path: Path) -> None:
    found = outlook(described(tiny_vision_model("qwen3_vl", vision_layers=NUM_LAYERS), tmp_path))
    assert found.layers == NUM_LAYERS
    assert "4 layers may go" in found.answers["search"].why
    assert "features of the image are added behind layers 0, 1" in found.answers["search"].why


def test_a_model_without_a_decoder_alone_is_refused_with_its_reason(tmp_path: Path) -> None:
    config = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, vocab_size=20)
    config.architectures = ["BartForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    found = outlook(str(tmp_path))
    assert found.layers is None
    assert not any(answer.yes for answer in found.answers.values())
    assert "encoder-decoder" in found.answers["prune"].why


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    folder = described(tiny_model("llama"), tmp_path)
    result = CliRunner().invoke(app, ["plan", folder, "--device", "h100:8", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found.pop("forecast")["machine"]["devices"] == 8
    assert found == outlook(folder).to_dict()
    table = CliRunner().invoke(app, ["plan", folder])
    assert table.exit_code == 0
    assert "LayerSkipRuntime decodes it" in table.stdout
    assert "1 layers removed on this CPU" not in table.stdout
    assert "distill" in table.stdout.partition("removed on")[2]
    refused = CliRunner().invoke(app, ["plan", folder, "--device", "h1000"])
    assert refused.exit_code != 0
    assert CliRunner().invoke(app, ["plan", str(tmp_path / "nowhere")]).exit_code != 0
