"""Chats on the command line: of what the assistant writes alone is every figure, in every command."""

import json
from pathlib import Path

import pytest
import yaml
from cli.conftest import Command, byte_tokenizer, pipeline_file
from tiny_models import tiny_model

import e3pruner
from e3pruner.surgery import PruningPlan
from e3pruner.text import Packed
from e3pruner.text.splits import token_splits

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"
LENGTH = 48


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "chats.jsonl"
    turns = [(f"what is {number} and {number}?", f"that is {2 * number}") for number in range(60)]
    talks = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in turns]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "chatting"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def splits(chats: Path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return token_splits(tokenizer, chats, length=LENGTH, seed=0)


def test_search_and_evaluation_count_the_assistant_alone(
    chats: Path, folder: Path, tmp_path: Path, e3: Command
) -> None:
    shared = ["--model", folder, "--text", chats, "--length", LENGTH]
    result = e3("search", *shared, "--method", "greedy", "--drop", 2, "--sequences", 2, "--out", tmp_path / "searched")
    assert result.exit_code == 0, result.output
    plan = PruningPlan.load(tmp_path / "searched" / "pruning.json")
    texts = splits(chats)
    assert isinstance(texts.calibration, Packed)
    assert plan.metrics["tokens"] == (texts.calibration[:2].labels >= 0).sum()

    result = e3("eval", *shared, "--held-out", 2, "--no-speed", "--out", tmp_path / "figures")
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "figures" / "results.json").read_text())["models"]
    assert row["tokens"] == (texts.held_out[:2].labels >= 0).sum() < 2 * (LENGTH - 1) / 2
    model = e3pruner.evaluate(tiny_model("llama", vocab_size=257), texts.held_out[:2], progress=False)
    assert row["perplexity"] == pytest.approx(model["perplexity"], rel=1e-5)


def test_a_whole_run_takes_chats(chats: Path, folder: Path, tmp_path: Path, e3: Command) -> None:
    settings = {"model": str(folder), "text": str(chats), "length": LENGTH, "sequences": 3, "held_out": 2, "drop": 2}
    pipeline = pipeline_file(tmp_path, **settings, rounds=1, compensate="scale", cached=True, out=str(tmp_path / "out"))
    result = e3("run", pipeline)
    assert result.exit_code == 0, result.output
    models = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    assert {model["tokens"] for model in models} == {int((splits(chats).held_out[:2].labels >= 0).sum())}


def test_a_comparison_does_not_read_chats_as_plain_text(chats: Path, folder: Path, tmp_path: Path, e3: Command) -> None:
    matrix = {"model": str(folder), "methods": ["last-n"], "drop": [1], "seeds": [0], "text": [str(chats)]}
    (tmp_path / "matrix.yaml").write_text(yaml.safe_dump(matrix))
    result = e3("compare", tmp_path / "matrix.yaml", "--out", tmp_path / "out")
    assert result.exit_code != 0
    assert "holds documents" in result.output
