"""How fast a model reads a prompt and writes tokens, by its own `generate`."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from e3pruner.models import output_head
from e3pruner.models.stack import evaluating, returning_dicts


class _Clock(BaseStreamer):
    """Notes when `generate` hands over the prompt and every token after it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""


def latency(
    model: PreTrainedModel, *, prompt_tokens: int = 128, new_tokens: int = 32, repeats: int = 5
) -> dict[str, float]:
    """Median speed of greedy `model.generate` with its cache, one sequence, in the type of the weights.

    The prompt is `prompt_tokens` fixed random tokens; `new_tokens` are generated, `repeats` times after one warm-up.

    Returns "prefill_tokens_per_s", prompt tokens over the time to the first new token, and "decode_tokens_per_s", the
    other new tokens over the time they took. Raises `ValueError` for counts below 1, and below 2 for `new_tokens`.
    """
    counts = {"prompt_tokens": (prompt_tokens, 1), "new_tokens": (new_tokens, 2), "repeats": (repeats, 1)}
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    vocabulary = output_head(model).weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(model.device)
    with evaluating(model), returning_dicts(model):
        _generate(model, prompt, 2)
        runs = [_generate(model, prompt, new_tokens) for _ in range(repeats)]
    return {
        "prefill_tokens_per_s": prompt_tokens / statistics.median(first for first, _ in runs),
        "decode_tokens_per_s": (new_tokens - 1) / statistics.median(rest for _, rest in runs),
    }


def _generate(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first new token, and from there to the last."""
    clock = _Clock(model.device)
    generate: Any = model.generate
    generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        streamer=clock,
    )
    return clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1]
