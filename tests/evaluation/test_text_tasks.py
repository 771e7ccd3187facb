"""Tasks made from text by rule: what they ask, and what a model by hand answers."""

import json
import random

import pytest
import torch
from cli.conftest import byte_tokenizer
from tiny_models import tiny_model

from e3pruner.evaluation import evaluate_tasks
from e3pruner.evaluation.text_tasks import telling, write_text_tasks

WORDS = ["river", "stone", "lantern", "window", "garden", "bottle", "mirror", "candle", "forest", "bridge", "letter"]


@pytest.fixture(scope="module")
def passages():
    draw = random.Random(0)
    return {"a kind/1": [" ".join(draw.choice(WORDS) for _ in range(30)) for _ in range(12)]}


@pytest.fixture(scope="module")
def folder(passages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    assert write_text_tasks(folder, passages) == ["last_word_a_kind_1", "continuation_a_kind_1"]
    return folder


def documents(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_what_is_asked_stands_in_the_passage(passages, folder):
    texts = passages["a kind/1"]
    for row in documents(folder, "last_word_a_kind_1"):
        assert any(row["context"] + row["word"] in text for text in texts)
        assert row["word"].strip() in WORDS
    for row in documents(folder, "continuation_a_kind_1"):
        (own,) = {end for end in row["choices"] if any(row["context"] + end in text for text in texts)}
        assert row["choices"][row["label"]] == own
        assert len(set(row["choices"])) == 4
    labels = {row["label"] for row in documents(folder, "continuation_a_kind_1")}
    assert len(labels) > 2  # the right one is not always in one place


@torch.no_grad()
def test_the_harness_scores_them_as_one_would_by_hand(folder):
    pytest.importorskip("lm_eval", reason="needs e3kernels[harness]")
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    rows, right = documents(folder, "continuation_a_kind_1"), 0
    for row in rows:
        likelihoods = []
        for end in row["choices"]:
            context, whole = (tokenizer(text)["input_ids"] for text in (row["context"], row["context"] + end))
            logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = torch.arange(len(context), len(whole))
            likelihoods.append(float(logprobs[places - 1, torch.tensor(whole)[places]].sum()))
        right += likelihoods.index(max(likelihoods)) == row["label"]
    found = evaluate_tasks(model, tokenizer, ["last_word_a_kind_1", "continuation_a_kind_1"], folder=folder)
    assert found["continuation_a_kind_1"]["acc"] == pytest.approx(right / len(rows))
    assert found["last_word_a_kind_1"]["acc"] == 0  # of a random model


def test_only_tasks_that_the_dense_model_can_do_are_kept(passages, tmp_path):
    dense = {"last_word_a": {"acc": 0.1}, "last_word_b": {"acc": 0.09}, "continuation_a": {"acc": 0.34}}
    assert telling(dense | {"continuation_b": {"acc": 0.36}}) == ["last_word_a", "continuation_b"]
    with pytest.raises(ValueError, match=r"passages of 'few' make 3 documents of last_word; give more than 4"):
        write_text_tasks(tmp_path, {"few": passages["a kind/1"][:3]})
