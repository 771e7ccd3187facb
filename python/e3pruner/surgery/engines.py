"""What other engines fix in their code: of which kind each layer of a model type is, by its index alone.

A pruned checkpoint says in its configuration what each of its layers is. An engine that does not read it there runs it
wrongly, and silently, where the layers that stay break the engine's rule.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from e3pruner.surgery.demands import Order
from e3pruner.vocabulary import did_you_mean


@dataclass(frozen=True)
class Fact:
    """`engine`, at commit `version`, in `file`, takes layer i of a `model_type` for `cycle[i % len(cycle)]`, whatever
    the list `setting` of the configuration says."""

    engine: str
    version: str
    file: str
    model_type: str
    setting: str
    cycle: tuple[Any, ...]

    def order(self, config: PreTrainedConfig) -> Order | None:
        """The rule as a demand on the layers that stay; None for a model that does not follow it itself."""
        text = config.get_text_config(decoder=True)
        kinds = tuple(getattr(text, self.setting, None) or ())
        rule = tuple(self.cycle[layer % len(self.cycle)] for layer in range(len(kinds)))
        if text.model_type != self.model_type or kinds != rule:
            return None
        period = ", ".join(map(str, self.cycle))
        reason = (
            f"{self.engine} ({self.file} at {self.version}) fixes the {self.setting} of {self.model_type} to {period}"
        )
        return Order(kinds, rule, f"{reason}, over and over")


def _windows(period: int) -> tuple[str, ...]:
    """Of every so many layers the last attends to everything."""
    return ("sliding_attention",) * (period - 1) + ("full_attention",)


_LLAMA = ("llama.cpp", "0034230", "src/llama-model.cpp")
FACTS = (
    Fact(*_LLAMA, "cohere2", "layer_types", _windows(4)),
    Fact(*_LLAMA, "gemma2", "layer_types", _windows(2)),
    Fact(*_LLAMA, "gemma3_text", "layer_types", _windows(6)),
    Fact(*_LLAMA, "gemma3n_text", "layer_types", _windows(5)),
    Fact("llama.cpp", "a0b8c17", "src/models/smollm3.cpp", "smollm3", "no_rope_layers", (1, 1, 1, 0)),
    Fact("SGLang", "00b08c4", "python/sglang/srt/models/gemma2.py", "gemma2", "layer_types", _windows(2)),
    Fact("vLLM", "a6b6cfa", "vllm/model_executor/models/gpt_oss.py", "gpt_oss", "layer_types", _windows(2)),
)
ENGINES = tuple(dict.fromkeys(fact.engine for fact in FACTS))


def engine_named(engine: str) -> str:
    """The engine as `FACTS` spell it, in whatever case it is given. Raises ValueError if nothing is known of it."""
    known = {name.lower(): name for name in ENGINES}
    if engine.lower() not in known:
        raise ValueError(
            f"quota={engine!r} names no engine{did_you_mean(engine, ENGINES)}; known are {', '.join(ENGINES)}; or "
            "give a number for each kind of layer"
        )
    return known[engine.lower()]


def orders_of(config: PreTrainedConfig, engine: str) -> list[Order]:
    """What the layers that stay must be for `engine` to run them as they are; empty where no rule of it is known.

    Raises ValueError for an engine that nothing is known of.
    """
    name = engine_named(engine)
    found = (fact.order(config) for fact in FACTS if fact.engine == name)
    return [order for order in found if order is not None]


def warn_of_engines(config: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Warns by name of every engine whose rule the dense model follows and the layers `kept` break."""
    for fact in FACTS:
        order = fact.order(config)
        if order is not None and order.broken_by(kept):
            warnings.warn(
                f"{order.reason}: it would run the layers {list(kept)} wrongly; search with quota={fact.engine!r} for "
                "layers that keep to it",
                stacklevel=4,
            )
