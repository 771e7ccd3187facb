"""Tokens of a text file: whole, in splits that share nothing."""

import json
import re
from pathlib import Path

import pytest
from cli.conftest import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from e3pruner.text import Packed
from e3pruner.text.sequences import as_sequences
from e3pruner.text.splits import split_text, take, token_splits


@given(st.text(max_size=300))
def test_splits_are_the_text(text: str) -> None:
    assert "".join(split_text(text).values()) == text


def test_splits_end_between_words() -> None:
    text = " ".join(f"word{number}" for number in range(1000))
    parts = split_text(text)
    assert [round(len(part) / len(text), 2) for part in parts.values()] == [0.7, 0.1, 0.2]
    words = [set(part.split()) for part in parts.values()]
    assert sum(map(len, words)) == len(set().union(*words)) == 1000


def test_tokens_of_a_file(text_file: Path) -> None:
    splits = token_splits(byte_tokenizer(), text_file, length=64, seed=0)
    parts = split_text(text_file.read_text(encoding="utf-8"))
    for name, sequences in splits._asdict().items():
        assert sequences.shape == (len(parts[name].encode()) // 64, 64)
        assert parts[name].startswith(byte_tokenizer().decode(sequences.flatten()[:-4]))


def test_built_in_text_has_all_splits() -> None:
    splits = token_splits(byte_tokenizer(), None, length=256, seed=0)
    assert min(map(len, splits)) > 16
    rows = [{tuple(row) for row in split.tolist()} for split in splits]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_too_short_a_text_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words only")
    with pytest.raises(ValueError, match=r"split training: \d+ tokens make no sequence of --length 64"):
        token_splits(byte_tokenizer(), short, length=64, seed=0)


def test_more_sequences_than_there_are(text_file: Path) -> None:
    splits = token_splits(byte_tokenizer(), text_file, length=64, seed=0)
    with pytest.raises(ValueError, match=r"--sequences 9999 is more than the \d+ sequences of 64 tokens"):
        take(splits.calibration, 9999, "--sequences")


def test_documents_are_dealt_out_whole(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {number:03d} " * 8}) + "\n" for number in range(60)))
    tokenizer = byte_tokenizer()
    splits = token_splits(tokenizer, path, length=64, seed=0)
    assert isinstance(splits.training, Packed)
    found = [
        set(re.findall(r"document (\d{3}) ", tokenizer.decode(as_sequences(split).input_ids.flatten())))
        for split in splits
    ]
    assert [len(numbers) for numbers in found] == [42, 6, 12]
    assert sum(map(len, found)) == len(set().union(*found))
