"""What decodes: Hugging Face's own forward, or the compiled runtime. One prompt, then one token at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from e3kernels.profiling import named_range
from e3pruner.compat import CACHE
from e3pruner.profiling.ceilings import synchronizer
from e3pruner.runtime import LayerSkipRuntime
from e3pruner.runtime.layer_skip import Keep
from e3pruner.timing import Estimate


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


def speed_of(rounds: Sequence[Speed]) -> dict[str, Estimate]:
    """The estimates of both phases, by their names."""
    return {phase: Estimate.of_times([getattr(each, phase) for each in rounds]) for phase in Speed._fields}


def now(synchronize: Callable[[], None] | None) -> float:
    if synchronize is not None:
        synchronize()
    return time.perf_counter()
