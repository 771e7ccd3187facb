"""`--placement stream` and `--quota ENGINE` on the command line do what they do in the library."""

import json
from pathlib import Path

import pytest
import yaml
from cli.conftest import Command, byte_tokenizer
from tiny_models import tiny_model

from e3pruner import PruningPlan
from e3pruner.models import streaming

SMALL = ("--length", 32, "--sequences", 4, "--batch", 2)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were streamed from."""
    asked: list[Path] = []
    made = streaming.streamed_model

    def noted(folder, *given, **options):
        asked.append(folder)
        return made(folder, *given, **options)

    monkeypatch.setattr("e3pruner.models.loading.streamed_model", noted)
    return asked


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_search_streams_to_the_same_plan(
    model_folder: Path, text_file: Path, tmp_path: Path, streams: list, e3: Command
) -> None:
    plans = []
    for placement in ("whole", "stream"):
        assert streams == []
        out = tmp_path / placement
        given = ("--model", model_folder, "--text", text_file, "--drop", 2, "--method", "greedy", *SMALL)
        result = e3("search", *given, "--placement", placement, "--out", out)
        assert result.exit_code == 0, result.output
        assert yaml.safe_load((out / "e3.yaml").read_text())["placement"] == placement
        plans.append((out / "pruning.json").read_bytes())
    assert (len(streams), plans[0]) == (1, plans[1])


def test_eval_streams_both_models_to_the_same_figures(
    model_folder: Path, text_file: Path, tmp_path: Path, streams: list, e3: Command
) -> None:
    rows = []
    for placement in ("whole", "stream"):
        given = ("--model", model_folder, "--teacher", model_folder, "--text", text_file, "--no-speed")
        size = ("--length", 32, "--held-out", 4)
        result = e3("eval", *given, *size, "--placement", placement, "--out", tmp_path / placement)
        assert result.exit_code == 0, result.output
        rows.append(results(tmp_path / placement)["models"])
    assert streams
    assert rows[0] == rows[1]


def test_cache_teacher_streams_to_the_same_shards(
    model_folder: Path, text_file: Path, tmp_path: Path, streams: list, e3: Command
) -> None:
    shards = []
    for placement in ("whole", "stream"):
        given = ("--teacher", model_folder, "--text", text_file, "--length", 32, "--placement", placement)
        result = e3("cache-teacher", *given, "--out", tmp_path / placement)
        assert result.exit_code == 0, result.output
        shards.append([path.read_bytes() for path in sorted((tmp_path / placement).rglob("*.safetensors"))])
    assert streams
    assert shards[0]
    assert shards[0] == shards[1]


def test_a_search_keeps_to_what_an_engine_fixes(text_file: Path, tmp_path: Path, e3: Command) -> None:
    tokenizer, folder = byte_tokenizer(), tmp_path / "gemma2"
    kinds = ["sliding_attention", "full_attention"] * 3
    tiny_model("gemma2", vocab_size=len(tokenizer), layer_types=kinds).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    given = ("--text", text_file, "--drop", 3, "--method", "greedy", *SMALL)
    result = e3("search", "--model", folder, *given, "--quota", "LLAMA.cpp", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    kept = [kinds[layer] for layer in PruningPlan.load(tmp_path / "out" / "pruning.json").kept]
    assert kept == kinds[:3]
    again = e3("search", "--config", tmp_path / "out" / "e3.yaml", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert yaml.safe_load((tmp_path / "again" / "e3.yaml").read_text())["quota"] == "LLAMA.cpp"


def test_a_streamed_model_writes_by_transformers(text_file: Path, tmp_path: Path, e3: Command) -> None:
    tokenizer = byte_tokenizer()
    network = tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=0, max_position_embeddings=512)
    for part in (network, tokenizer):
        part.save_pretrained(tmp_path / "model")
    given = ("--model", tmp_path / "model", "--text", text_file, "--length", 32, "--held-out", 2, "--no-speed")
    found = {}
    for placement in ("whole", "stream"):
        result = e3(
            "eval", *given, "--generate", "--max-new-tokens", 6, "--placement", placement, "--out", tmp_path / placement
        )
        assert result.exit_code == 0, result.output
        found[placement] = results(tmp_path / placement)["writing"][str(tmp_path / "model")]["greedy"]
    assert "written by transformers" in result.output
    assert found["stream"] == found["whole"]
