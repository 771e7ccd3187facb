"""What hears of the tokens while the compiled loop runs: a streamer, and the strings that end a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer


class TokenListener:
    """Called by the C++ loop after every step, only where there is a streamer or a stop string."""

    def __init__(
        self, batch: int, stop: list[str], tokenizer: PreTrainedTokenizerBase | None, streamer: BaseStreamer | None
    ) -> None:
        self.stop, self.tokenizer, self.streamer = stop, tokenizer, streamer
        # Every token but the first few of a character adds text: so many tokens hold the longest stop string.
        self.window = max((len(text.encode()) for text in stop), default=0) + 4
        self.tails: list[list[int]] = [[] for _ in range(batch)]

    @classmethod
    def make(
        cls,
        batch: int,
        stop_strings: str | Sequence[str] | None,
        tokenizer: PreTrainedTokenizerBase | None,
        streamer: BaseStreamer | None,
    ) -> TokenListener | None:
        stop = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        if stop and tokenizer is None:
            raise ValueError("stop_strings needs tokenizer, which turns tokens into text")
        if any(not text for text in stop):
            raise ValueError("stop_strings holds an empty string, which every text contains")
        if streamer is not None and batch != 1:
            raise ValueError(f"streamer takes one sequence; input_ids has {batch}")
        return cls(batch, stop, tokenizer, streamer) if stop or streamer is not None else None

    def __call__(self, tokens: list[int]) -> list[bool] | None:
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens))
        if not self.stop or self.tokenizer is None:
            return None
        ended = []
        for tail, token in zip(self.tails, tokens, strict=True):
            tail.append(token)
            text = self.tokenizer.decode(tail[-self.window :])
            ended.append(any(stop in text for stop in self.stop))
        return ended
