"""Documents from files, as tokens that are learnt or only read, and packed into rows that keep them apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from e3pruner.requirements import require
from e3pruner.storage import parse_json
from e3pruner.text.opening import encode, opening
from e3pruner.text.sequences import IGNORED, Packed


class Marked(NamedTuple):
    """One document: token ids, and for each whether it is to be predicted."""

    tokens: list[int]
    learnt: list[bool]


def holds_documents(path: Path) -> bool:
    """Whether `read_documents` reads `path`: JSON lines by their name, a folder as a Hugging Face data set."""
    return path.suffix == ".jsonl" or path.is_dir()


def read_documents(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Marked]:
    """The documents of a .jsonl file, or of a folder that `datasets.Dataset.save_to_disk` wrote (needs `datasets`).

    A record holds "text", all of which is learnt, or "messages", [{"role", "content"}, ...], of which the assistant's
    are. A text begins as the tokenizer's own convention says (see `opening`) and ends with its end-of-sequence token,
    if it has one; how a conversation begins and ends, the chat template alone says.

    Raises ValueError naming the record that holds neither, and for messages without a chat template.
    """
    documents = []
    for number, record in enumerate(_folder_records(path) if path.is_dir() else _line_records(path), start=1):
        try:
            documents.append(_document(record, tokenizer))
        except ValueError as error:
            raise ValueError(f"{path}, record {number}: {error}") from error
    if not documents:
        raise ValueError(f"{path} holds no document")
    return documents


def _line_records(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield parse_json(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number} is no JSON: {error}") from error


def _folder_records(path: Path) -> Iterator[Any]:
    require("datasets")
    from datasets import Dataset, load_from_disk  # optional

    found = load_from_disk(str(path))
    if not isinstance(found, Dataset):
        raise ValueError(f"{path} holds the splits {list(found)}; name the folder of one of them")
    yield from found


def _document(record: Any, tokenizer: PreTrainedTokenizerBase) -> Marked:
    if isinstance(record, Mapping) and isinstance(record.get("text"), str):
        begin, tokens = len(opening(tokenizer)), [*encode(tokenizer, record["text"]), *ending(tokenizer)]
        return Marked(tokens, [place >= begin for place in range(len(tokens))])
    if isinstance(record, Mapping) and isinstance(record.get("messages"), list):
        return mark_assistant(record["messages"], tokenizer)
    raise ValueError('it must hold "text", a string, or "messages", a list')


def ending(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands behind a document: the end-of-sequence token, if the tokenizer has one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def mark_assistant(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Marked:
    """A conversation in the tokenizer's chat template; learnt is what the assistant has to write, with its end mark.

    The assistant's text begins where the template prompts for it, so no template has to mark it. Raises ValueError for
    messages without role and content, or that the assistant begins, for a tokenizer without a template, and for one
    that renders some messages otherwise when more follow.
    """
    if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages) or not messages:
        raise ValueError("each of its messages must hold role and content")
    if messages[0]["role"] == "assistant":
        raise ValueError("the assistant begins; a system's or user's message must come first")
    if not tokenizer.chat_template:
        raise ValueError("it holds messages, and the tokenizer has no chat template")

    def rendered(count: int, prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))

    text = rendered(len(messages), False)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, answer = rendered(number, True), rendered(number + 1, False)
            if not (answer.startswith(prompt) and text.startswith(answer)):
                raise ValueError("the chat template rewrites earlier messages; the assistant's cannot be told apart")
            spans.append(range(len(prompt), len(answer)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return Marked(encoded["input_ids"], [any(start in span for span in spans) for start in starts])


def pack_documents(documents: Sequence[Marked], length: int, begin: Sequence[int] = ()) -> Packed:
    """Documents end to end, cut into rows of `length`; a rest shorter than a row goes, and so do rows with nothing to
    predict. No token is predicted from, or attends to, another document.

    `begin`: the tokenizer's `opening`. Of a document that begins with it each piece does, as it is read by itself.

    Raises ValueError if no row is left, or `begin` leaves no room in one.
    """
    pieces = list(_pieces(documents, length, list(begin)))
    tokens = torch.tensor([token for piece in pieces for token in piece.tokens], dtype=torch.int64)
    learnt = torch.tensor([mark for piece in pieces for mark in piece.learnt], dtype=torch.bool)
    sizes = torch.tensor([len(piece.tokens) for piece in pieces], dtype=torch.int64)
    owner = torch.arange(len(pieces)).repeat_interleave(sizes)
    rows = len(tokens) // length
    ids, learnt, owner = (stream[: rows * length].view(rows, length) for stream in (tokens, learnt, owner))
    first = torch.ones_like(owner, dtype=torch.bool)
    first[:, 1:] = owner[:, 1:] != owner[:, :-1]
    column = torch.arange(length).expand(rows, length)
    positions = column - torch.where(first, column, 0).cummax(-1).values
    labels = ids[:, 1:].masked_fill(~learnt[:, 1:] | first[:, 1:], IGNORED)
    some = (labels != IGNORED).any(-1)
    if not some.any():
        raise ValueError(
            f"length={length}: the {len(tokens)} tokens of {len(documents)} documents make no row with any to predict"
        )
    return Packed(ids[some], positions[some], labels[some])


def _pieces(documents: Iterable[Marked], length: int, begin: list[int]) -> Iterator[Marked]:
    """The documents, cut where rows of `length` end."""
    if len(begin) >= length:
        raise ValueError(
            f"length={length} leaves no room for text behind the {len(begin)} tokens that each row begins with"
        )
    room = length
    for tokens, learnt in documents:
        again = begin if tokens[: len(begin)] == begin else []
        start = 0
        while start < len(tokens):
            head: list[int] = []
            if start:  # a row ended within the document
                head, start = again, max(start, len(again))
            stop = start + room - len(head)
            yield Marked(head + tokens[start:stop], [False] * len(head) + learnt[start:stop])
            room -= len(head) + len(tokens[start:stop])
            room, start = room or length, stop
