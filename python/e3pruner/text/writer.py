"""Data-free text: the teacher writes its own training documents."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from e3pruner.compat import CACHE
from e3pruner.models.stack import returning_dicts

BATCH = 64
TOP_K = 64


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn from the TOP_K likeliest: a multinomial over 49,152 columns costs more than the model's whole step.
    values, ids = logits.float().topk(min(TOP_K, logits.shape[-1]))
    return ids.gather(-1, torch.multinomial(values.softmax(-1), 1, generator=generator))


def _continue(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], length: int, end: int, seed: int
) -> list[list[int]]:
    """`prompts` continued to `end` or `length` tokens."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    widest = max(map(len, prompts))
    ids = torch.tensor([[end] * (widest - len(p)) + list(p) for p in prompts], device=model.device)
    lengths = torch.tensor([len(p) for p in prompts], device=model.device)[:, None]
    mask = torch.arange(widest, device=model.device) >= widest - lengths
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    step, cache, finished = ids, None, torch.zeros_like(lengths, dtype=torch.bool)
    rows = [ids]
    for _ in range(length - int(lengths.min())):
        out = model(step, attention_mask=mask.long(), position_ids=positions, use_cache=True, **{CACHE: cache})
        step = _sample(out.logits[:, -1], generator).masked_fill(finished, end)
        rows.append(step)
        finished = finished | (step == end)
        if finished.all():
            break
        cache, positions = out[CACHE], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(finished)], dim=-1)
    written = torch.cat(rows, dim=-1).tolist()
    return [_cut(row[widest - len(p) :], len(p), length, end) for row, p in zip(written, prompts, strict=True)]


def _cut(row: list[int], prompt: int, length: int, end: int) -> list[int]:
    stop = row.index(end, prompt) + 1 if end in row[prompt:] else len(row)
    return row[: min(stop, length)]


def _mixed(*parts: int) -> int:
    # torch's generator reads the low 32 bits of a seed only.
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@torch.no_grad()
def write_documents(
    teacher: PreTrainedModel, prompts: Sequence[Sequence[int]], *, length: int, end: int, seed: int
) -> list[list[int]]:
    """Token lists that start with each prompt and run on, sampled by `teacher`, to the token `end` or `length` tokens.

    Sampling is at temperature 1 from the 64 likeliest tokens, in bf16; batch b of 64 prompts draws from the seed
    (seed, b), so that a document depends on its batch only. `teacher` itself is left as it is.

    Raises ValueError if a prompt is not shorter than `length`.
    """
    if (widest := max(map(len, prompts))) >= length:
        raise ValueError(f"length={length} must exceed the longest prompt, {widest} tokens")
    model = copy.deepcopy(teacher).eval()
    model.to(dtype=torch.bfloat16)
    starts = range(0, len(prompts), BATCH)
    rows = []
    with returning_dicts(model):
        for i in track(starts, description="teacher writes", transient=True):
            rows += _continue(model, prompts[i : i + BATCH], length, end, _mixed(seed, i))
    return rows
