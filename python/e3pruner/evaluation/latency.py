"""How fast models read a prompt and write tokens, by their own `generate`, in turns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from e3pruner.models import output_head
from e3pruner.models.stack import evaluating, returning_dicts
from e3pruner.timing import Estimate, in_turns, unsettled, watched

_MOST_ROUNDS = 15
_REMEDY = "measure again, with nothing else at work"


class Speeds(NamedTuple):
    """What `speeds` measured of each model, by its name, and `timing`: how far that can be trusted.

    of: "prefill_tokens_per_s" and "decode_tokens_per_s", None where the interval of the time holds nonsense, with their
    quartiles over the rounds as "prefill_quartiles" and "decode_quartiles", and "rounds". timing: "doubts", the reasons
    why it is not reliable, and the machine's "load_average", "cores_of_others" and "mhz" in the "seconds" that it took.
    """

    of: dict[str, dict[str, Any]]
    timing: dict[str, Any]


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


class _Run(NamedTuple):
    """Seconds to the first new token, and from there to the last."""

    prefill: float
    decode: float


def latency(
    model: PreTrainedModel, *, prompt_tokens: int = 128, new_tokens: int = 32, repeats: int = 5, limit: float = 30.0
) -> dict[str, Any]:
    """Speed of one model alone: what `speeds` finds of it, by the same arguments."""
    found = speeds({"model": model}, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats, limit=limit)
    return found.of["model"]


def speeds(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    limit: float = 30.0,
) -> Speeds:
    """Speed of greedy `model.generate` with its cache, one sequence, in the type of the weights; the models take turns.

    The prompt is `prompt_tokens` fixed random tokens; `new_tokens` are generated. `repeats` rounds are measured after
    one that does not count, and more, 15 at most, until every time is known to 2 % or `limit` seconds have passed. A
    time is the mean of the faster half of its rounds. The prompt's speed is prompt tokens over the time to the first
    new token, that of decoding the other new tokens over the time they took.

    Raises `ValueError` for counts below 1, and below 2 for `new_tokens`.
    """
    counts = {"prompt_tokens": (prompt_tokens, 1), "new_tokens": (new_tokens, 2), "repeats": (repeats, 1)}
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    actions = {name: partial(_generate, model, prompt_tokens, new_tokens) for name, model in models.items()}

    def settled(rounds: Mapping[str, Sequence[_Run]]) -> bool:
        return all(estimate.settled for runs in rounds.values() for estimate in _estimates(runs))

    with watched() as conditions:
        rounds = in_turns(actions, repeats, most=_MOST_ROUNDS, limit=limit, settled=settled)
    found, doubts = {}, conditions.doubts()
    for name, runs in rounds.items():
        prefill, decode = _estimates(runs)
        doubts += unsettled({f"{name}, reading the prompt": prefill, f"{name}, writing": decode}, _REMEDY)
        found[name] = (
            _speed("prefill", prefill, prompt_tokens) | _speed("decode", decode, new_tokens - 1) | {"rounds": len(runs)}
        )
    return Speeds(found, {"doubts": doubts, **conditions.row()})


def _estimates(runs: Sequence[_Run]) -> tuple[Estimate, Estimate]:
    return Estimate.of_times([run.prefill for run in runs]), Estimate.of_times([run.decode for run in runs])


def _speed(phase: str, time: Estimate, tokens: int) -> dict[str, Any]:
    rate = time.rate(tokens)
    return {
        f"{phase}_tokens_per_s": rate.value if time.known else None,
        f"{phase}_quartiles": [rate.low, rate.high],
    }


def _generate(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> _Run:
    vocabulary = output_head(model).weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(model.device)
    clock = _Clock(model.device)
    generate: Any = model.generate
    with evaluating(model), returning_dicts(model):
        generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            streamer=clock,
        )
    return _Run(clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1])
