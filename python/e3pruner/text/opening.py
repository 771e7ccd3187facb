"""How a text begins: with what its tokenizer puts before every text, and with nothing else."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that `tokenizer` puts before every text by its own convention: a begin-of-sequence token, or several
    (GLM), or none. What it puts behind a text is no part of it.
    """
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of `text`, which begins with the opening, once."""
    begin = opening(tokenizer)
    return begin + without_opening(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], begin)


def without_opening(tokens: list[int], begin: list[int]) -> list[int]:
    return tokens[len(begin) :] if tokens[: len(begin)] == begin else tokens


def cut_stream(stream: Tensor, length: int, begin: list[int]) -> Tensor:
    """The tokens `stream` (T,) in rows (N, `length`) that begin with `begin` each, since each is a sequence of its own;
    what makes no whole row goes. Raises ValueError if `begin` leaves no room.
    """
    if (room := length - len(begin)) < 1:
        raise ValueError(
            f"length={length} leaves no room for text behind the {len(begin)} tokens that each row begins with"
        )
    rows = stream[: len(stream) // room * room].view(-1, room)
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(len(rows), -1), rows], dim=1)
