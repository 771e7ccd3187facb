"""What decodes: Hugging Face's own forward, or the compiled runtime. One prompt, then one token at a time."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from e3kernels.profiling import named_range
from e3pruner.compat import CACHE
from e3pruner.runtime import LayerSkipRuntime
from e3pruner.runtime.layer_skip import Keep

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


class Speed(NamedTuple):
    """Seconds to read the prompt, and for each token after it."""

    prefill: float
    decode: float


@dataclass
class Eager:
    """`model(...)` with its own cache, as `generate` calls it; `generate`'s own work around it is left out."""

    model: PreTrainedModel
    name = "eager"

    def prefill(self, ids: Tensor) -> Any:
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return output[CACHE], output.logits[:, -1:].argmax(-1)

    def step(self, state: Any) -> Any:
        cache, token = state
        output = self.model(input_ids=token, use_cache=True, **{CACHE: cache})
        return output[CACHE], output.logits[:, -1:].argmax(-1)


@dataclass
class Runtime:
    """`LayerSkipRuntime` with the layers `keep`; `capacity` slots of its cache are allocated at once."""

    runtime: LayerSkipRuntime
    capacity: int
    keep: Keep | None = None
    name = "runtime"

    def prefill(self, ids: Tensor) -> Any:
        self.runtime.keep = self.keep
        cache = self.runtime.new_cache(ids.shape[0], capacity=self.capacity)
        return cache, self.runtime.append(cache, ids)[:, -1:].argmax(-1)

    def step(self, state: Any) -> Any:
        cache, token = state
        return cache, self.runtime.append(cache, token)[:, -1:].argmax(-1)


Engine = Eager | Runtime


@torch.no_grad()
def run(engine: Engine, ids: Tensor, tokens: int) -> Speed:
    """One prompt (B, T) and `tokens` steps after it; ranges "prefill" and, for each step, "decode"."""
    synchronize = synchronizer(ids.device)
    began = now(synchronize)
    with named_range("prefill"):
        state = engine.prefill(ids)
    read = now(synchronize)
    for _ in range(tokens):
        with named_range("decode"):
            state = engine.step(state)
    return Speed(read - began, (now(synchronize) - read) / tokens)


def in_turns(actions: Mapping[Name, Callable[[], Result]], rounds: int) -> dict[Name, list[Result]]:
    """What each action returned in each of `rounds`, in which all take turns so that drift hits all alike, in an order
    drawn anew, so that none always follows the same other; one round before them does not count.
    """
    results: dict[Name, list[Result]] = {name: [] for name in actions}
    order, draw = list(actions), random.Random(0)
    for _ in range(rounds + 1):
        draw.shuffle(order)
        for name in order:
            results[name].append(actions[name]())
    return {name: mine[1:] for name, mine in results.items()}


def faster_half(rounds: Sequence[Result], seconds: Callable[[Result], float]) -> list[Result]:
    """The rounds up to the median, which are averaged: what else the machine does only adds time, and their mean
    scatters two thirds as much as the median of all.
    """
    return sorted(rounds, key=seconds)[: (len(rounds) + 1) // 2]


def typical_speed(rounds: Sequence[Speed]) -> Speed:
    """The mean of the `faster_half`, of each phase by itself."""
    return Speed(*(statistics.mean(faster_half(column, float)) for column in zip(*rounds, strict=True)))


def synchronizer(device: torch.device) -> Callable[[], None] | None:
    return None if device.type == "cpu" else lambda: torch.accelerator.synchronize(device)


def now(synchronize: Callable[[], None] | None) -> float:
    if synchronize is not None:
        synchronize()
    return time.perf_counter()
