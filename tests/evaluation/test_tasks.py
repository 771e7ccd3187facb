"""Tasks of the evaluation harness, defined on disk, on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from cli.conftest import byte_tokenizer
from tiny_models import tiny_model
from typer.testing import CliRunner

from e3pruner.cli import app
from e3pruner.evaluation import evaluate_tasks

CHOICES = ["red", "a blue one", "green", "it"]


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    return [{"question": f"Which colour has number {n * n}?", "answer": n % len(CHOICES)} for n in range(12)]


@pytest.fixture(scope="module")
def folder(documents: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason="needs e3kernels[harness]")
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "colours.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "colours.jsonl")}, "cache_dir": str(folder / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": CHOICES,
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "colours.yaml").write_text(yaml.safe_dump(task))
    return folder


@torch.no_grad()
def accuracy(model, tokenizer, documents) -> float:
    """The share of documents whose answer is the likeliest continuation."""
    right = 0
    for document in documents:
        likelihoods = []
        for choice in CHOICES:
            prompt = tokenizer(document["question"])["input_ids"]
            ids = torch.tensor([prompt + tokenizer(" " + choice)["input_ids"]])
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            likelihoods.append(float(logprobs[len(prompt) - 1 :].sum()))
        right += likelihoods.index(max(likelihoods)) == document["answer"]
    return right / len(documents)


def test_the_harness_scores_the_model_in_memory(folder: Path, documents: list[dict]) -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=128)
    expected = accuracy(model, tokenizer, documents)
    assert 0 < expected < 1  # another model or another task would score otherwise
    scores = evaluate_tasks(model, tokenizer, ["colours"], folder=folder)["colours"]
    assert scores["acc"] == expected
    assert scores["acc_stderr"] == pytest.approx((expected * (1 - expected) / (len(documents) - 1)) ** 0.5)
    limited = evaluate_tasks(model, tokenizer, ["colours"], folder=folder, limit=3)["colours"]["acc"]
    assert limited == accuracy(model, tokenizer, documents[:3])


def test_the_command_scores_tasks(folder: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a word and another, " * 100)
    text = ["--text", str(tmp_path / "text.txt"), "--length", "16", "--held-out", "2", "--no-speed"]
    tasks = ["--task", "colours", "--task-folder", str(folder), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["eval", "--model", str(tmp_path / "model"), *text, *tasks])
    assert result.exit_code == 0, result.output
    ((name, scores),) = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"].items()
    assert name == str(tmp_path / "model")
    assert f"{scores['colours']['acc']:.4f}" in result.stdout


def test_what_is_not_defined_is_named(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match=r"tasks=\['colours', 'shapes'\]: shapes are not defined in "):
        evaluate_tasks(model, tokenizer, ["colours", "shapes"], folder=folder)
    with pytest.raises(FileNotFoundError, match="is no folder of task definitions"):
        evaluate_tasks(model, tokenizer, ["colours"], folder=folder / "nowhere")
