"""Models of one tokenizer whose vocabularies are padded differently, from the command line."""

import json

import pytest
import torch
from cli.conftest import byte_tokenizer
from tiny_models import tiny_model
from torch.nn import functional as F

from e3pruner.text.splits import token_splits

SIZE = len(byte_tokenizer())
LENGTH = ["--length", 16, "--held-out", 2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a student and a teacher."""
    folders = []
    for seed, columns in enumerate((SIZE + 3, SIZE + 11)):
        folders.append(tmp_path_factory.mktemp("models") / str(columns))
        model = tiny_model("llama", seed, vocab_size=columns, eos_token_id=0, bos_token_id=0)
        model.save_pretrained(folders[-1])
        byte_tokenizer().save_pretrained(folders[-1])
    return folders


def figures(folder):
    return json.loads((folder / "results.json").read_text())["models"]


def test_eval_compares_what_both_have(e3, folders, tmp_path):
    student, teacher = folders
    for more, columns in (((), SIZE + 3), (("--vocabulary", SIZE), SIZE)):
        out = tmp_path / f"{columns}"
        done = e3("eval", "--model", student, "--teacher", teacher, "--no-speed", *LENGTH, "--out", out, *more)
        assert done.exit_code == 0, done.output
        tokens = token_splits(byte_tokenizer(), None, length=16, seed=0).held_out[:2]
        logits = []
        for seed, size in enumerate((SIZE + 3, SIZE + 11)):
            model = tiny_model("llama", seed, vocab_size=size)
            with torch.no_grad():
                logits.append(model(tokens).logits[:, :-1, :columns].flatten(0, 1).log_softmax(-1))
        expected = F.kl_div(*logits, log_target=True, reduction="batchmean").item()
        rows = {row["name"]: row for row in figures(out)}
        assert rows[str(student)]["kl"] == pytest.approx(expected, rel=1e-3)
        assert rows[str(teacher)]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("cached", [True, False])
def test_distill_learns_from_it(e3, folders, tmp_path, cached):
    student, teacher = folders
    source = ["--teacher", teacher]
    if cached:
        made = e3("cache-teacher", *source, "--length", 16, "--k", 5, "--out", tmp_path / "cache")
        assert made.exit_code == 0, made.output
        source = ["--teacher-cache", tmp_path / "cache"]
        assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["vocabulary"] == SIZE
    done = e3("distill", "--model", student, *source, *LENGTH, "--steps", 1, "--out", tmp_path / "recovered")
    assert done.exit_code == 0, done.output


def test_too_many_columns_are_refused_before_anything_is_written(e3, folders, tmp_path):
    student, teacher = folders
    out = tmp_path / "out"
    wrong = ["--vocabulary", SIZE + 4, "--out", out]
    done = e3("eval", "--model", student, "--teacher", teacher, *LENGTH, "--no-speed", *wrong)
    assert done.exit_code
    assert f"vocabulary={SIZE + 4} must be in 1 … {SIZE + 3}" in " ".join(done.output.split())
    assert not out.exists()
