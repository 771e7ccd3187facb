"""Tokens for a run: a text file's or the built-in text's, in splits that share nothing."""

from __future__ import annotations

import re
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.text.built_in import SHARES, deal, demo_tokens
from e3pruner.text.documents import holds_documents, pack_documents, read_documents
from e3pruner.text.files import naming, read_text
from e3pruner.text.opening import cut_stream, opening, without_opening
from e3pruner.text.sequences import Rows, Sequences

Taken = TypeVar("Taken", Tensor, Sequences, Rows)


class Splits(NamedTuple):
    """Token sequences, each (sequences, length) int64; of documents they are told apart, and so is what is learnt."""

    training: Rows
    calibration: Rows
    held_out: Rows


def token_splits(
    tokenizer: PreTrainedTokenizerBase,
    text: Path | None,
    *,
    length: int,
    seed: int,
    teacher: PreTrainedModel | None = None,
    option: str = "--text",
) -> Splits:
    """Training, calibration and held-out sequences of `length` tokens from the file `text`, or from the built-in text
    and, with a `teacher`, what it writes itself. Held-out sequences of the kinds of text take turns.

    Of JSON lines and data sets the documents are dealt out to the splits whole; see `e3pruner.text.documents`. Each
    sequence begins as the tokenizer's own convention says (see `e3pruner.text.opening`).

    Raises ValueError or OSError that begins with `option` and the file: when a split has not one whole sequence, for a
    file that is empty, not UTF-8 or not there, and for a record that is no document.
    """
    if text is None:
        built_in = demo_tokens(tokenizer, teacher, length=length, seed=seed)
        held_out = chain.from_iterable(zip_longest(*built_in.held_out.values()))
        turns = torch.stack([sequence for sequence in held_out if sequence is not None])
        return Splits(built_in.training, built_in.calibration, turns)
    with naming(option, text):
        return _splits(tokenizer, text, length)


def _splits(tokenizer: PreTrainedTokenizerBase, text: Path, length: int) -> Splits:
    if holds_documents(text):
        documents = read_documents(text, tokenizer)
        names = deal({str(number): len(document.tokens) for number, document in enumerate(documents)})
        begin = opening(tokenizer)
        packed = {
            split: pack_documents([documents[number] for number in sorted(map(int, numbers))], length, begin)
            for split, numbers in names.items()
        }
        return Splits(packed["training"], packed["calibration"], packed["held_out"])
    return Splits(**file_splits(tokenizer, text, length))


def file_splits(tokenizer: PreTrainedTokenizerBase, path: Path, length: int) -> dict[str, Tensor]:
    """The splits of a file of plain text, by name. Raises ValueError naming a split without one whole sequence."""
    return {name: cut(tokenizer, part, length, f"split {name}") for name, part in split_text(read_text(path)).items()}


def split_text(text: str) -> dict[str, str]:
    """`text` cut once between each two splits, in the proportions of the built-in text, after the next white space.

    The cut is made before tokenisation, so no character reaches two splits.
    """
    parts, start, share = {}, 0, 0.0
    for name in Splits._fields:
        share += SHARES[name]
        space = re.compile(r"\s").search(text, max(start, int(share * len(text))))
        stop = space.end() if space else len(text)
        parts[name] = text[start:stop]
        start = stop
    return parts


def cut(tokenizer: PreTrainedTokenizerBase, text: str, length: int, name: str = "text") -> Tensor:
    """`text` as sequences (N, `length`) int64, each of which begins as the tokenizer's own convention says, since it is
    read by itself; what makes no whole sequence goes. Raises ValueError naming `name` if there is not one.
    """
    begin = opening(tokenizer)
    ids = without_opening(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], begin)
    rows = cut_stream(torch.tensor(ids, dtype=torch.int64), length, begin)
    if len(rows) == 0:
        raise ValueError(
            f"{name}: {len(ids)} tokens make no sequence of --length {length}; give more text or a shorter one"
        )
    return rows


def take(sequences: Taken, count: int, option: str) -> Taken:
    """The first `count` sequences. Raises ValueError naming the option that asks for more than there are."""
    if count > len(sequences):
        have, length = sequences.shape
        raise ValueError(f"{option} {count} is more than the {have} sequences of {length} tokens that the text gives")
    return sequences[:count]


def batches(sequences: Taken, size: int) -> list[Taken]:
    """The sequences in batches of `size`, the last one perhaps smaller."""
    return list(sequences.split(size))
