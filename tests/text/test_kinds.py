"""Kinds of text for comparisons: where they come from, what the teacher writes, and which are left out."""

from pathlib import Path

import pytest
import torch
from cli.conftest import byte_tokenizer
from tiny_models import tiny_model

from e3pruner.text import sources
from e3pruner.text.kinds import kinds_of_text, leaving_one_out

CHAT = "{% for m in messages %}<{{ m.content }}>{% endfor %}"


@pytest.mark.parametrize("kind", [pytest.param("mathematics", marks=pytest.mark.slow), "graphs"])
def test_a_kind_that_comes_with_pytorch_fills_every_split_and_shares_no_passage(kind):
    text = kinds_of_text(byte_tokenizer(), [kind], length=256, held_out=32)
    assert len(text.calibration) >= 16
    assert text.held_out[kind].shape == (32, 256)
    assert sources.SOURCES[kind].licence


@pytest.fixture
def writing(monkeypatch, tmp_path):
    monkeypatch.setenv("E3_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "_WRITTEN_LENGTH", 96)
    monkeypatch.setattr(sources, "_WRITTEN_EACH", 1)
    tokenizer = byte_tokenizer()
    return tokenizer, tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=128)


def test_the_teacher_writes_kinds_of_its_own(writing):
    tokenizer, teacher = writing
    with pytest.raises(ValueError, match="the teacher writes prose, and none is given"):
        kinds_of_text(tokenizer, ["manual", "prose"], length=32, held_out=4)
    with pytest.raises(ValueError, match="'chat' needs a tokenizer with a chat template"):
        kinds_of_text(tokenizer, ["chat"], length=32, held_out=4, teacher=teacher)
    tokenizer.chat_template = CHAT
    text = kinds_of_text(tokenizer, ["prose", "chat"], length=32, held_out=4, teacher=teacher)
    assert set(text.held_out) == {"prose", "chat"}
    assert "<Explain" in tokenizer.decode(text.training.flatten()) or "<List" in tokenizer.decode(
        text.training.flatten()
    )
    again = kinds_of_text(tokenizer, ["prose", "chat"], length=32, held_out=4, teacher=teacher)  # from the cache
    assert torch.equal(text.training, again.training)


def test_leaving_a_kind_out_leaves_all_of_it_out(tmp_path):
    kinds = [str(tmp_path / name) for name in ("squares", "cubes", "words")]
    for path, write in zip(kinds, (lambda n: n**2, lambda n: n**3, lambda n: hex(n**4)), strict=True):
        Path(path).write_text(" ".join(str(write(n)) for n in range(900)))
    folds = leaving_one_out(byte_tokenizer(), kinds, length=64, held_out=4)
    assert list(folds) == kinds
    for left_out, text in folds.items():
        rest = kinds_of_text(byte_tokenizer(), [kind for kind in kinds if kind != left_out], length=64, held_out=4)
        assert torch.equal(text.training, rest.training)
        assert torch.equal(text.calibration, rest.calibration)
        assert list(text.held_out) == [left_out]
    with pytest.raises(ValueError, match="must name two kinds or more"):
        leaving_one_out(byte_tokenizer(), kinds[:1], length=64, held_out=4)
