"""How a pruned model is distilled: every option, its default and its legal values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """Options of `distill`. Raises ValueError naming the first that is not legal.

    steps: optimizer steps; None: one pass over the data. batch_size: sequences that go through the model together.
    accumulation: batches whose gradients make one step. lr: peak of AdamW's learning rate, reached after the fraction
    `warmup` of the steps and taken to 0 by a cosine. max_grad_norm: global gradient norm that a step is clipped to.
    temperature, weighting, gamma, kd_ratio, divergence: the loss, as in `e3kernels.linear_entropy_kl`.
    vocabulary: how many columns of both models' predictions count, from the first on, where they pad their vocabularies
    differently. None: all, where both have as many; else those that both have, if the tokenizer has no token beyond.
    trainable: "all" parameters; the "decoder" layers only (embeddings, final norm and output head stay frozen); "lora":
    matrices of rank `lora_rank` beside all linear layers, merged at the end; "cuts": the layers beside the cuts only;
    "norms": norms and biases only (PERP, arXiv 2312.15230).
    spike: a step whose loss is above `spike` times the median of the last 32 is skipped; inf: none.
    ema: decay δ of the moving average of the weights, e ← δ·e + (1 − δ)·θ after each step taken, from e = θ after the
    first; it is what held-out text is judged with and what the model ends with. None: none.
    precision: "bf16" (autocast over fp32 master weights), "fp32", or "auto": bf16 where the processor multiplies it.
    eval_every, save_every: steps between held-out evaluations and between saved states. seed: order of the data.
    """

    steps: int | None = None
    batch_size: int = 4
    accumulation: int = 1
    lr: float = 2e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    weighting: Literal["none", "entropy", "inverse", "mix"] = "entropy"
    gamma: float = 1.0
    kd_ratio: float = 0.9
    divergence: Literal["forward", "reverse", "jsd", "adaptive"] = "forward"
    vocabulary: int | None = None
    trainable: Literal["all", "decoder", "lora", "cuts", "norms"] = "all"
    lora_rank: int = 16
    spike: float = 3.0
    ema: float | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    eval_every: int = 25
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"{name}={value!r} must be one of {get_args(kind)}")
        for name in ("steps", "batch_size", "accumulation", "lora_rank", "eval_every", "save_every", "vocabulary"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("lr", "max_grad_norm", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be finite and above 0")
        if not self.spike > 1:
            raise ValueError(f"spike={self.spike} must be above 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema={self.ema} must be between 0 and 1, or None")
        for name in ("warmup", "kd_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        for name in ("weight_decay", "gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.weighting == "mix" and self.kd_ratio != 1:
            raise ValueError(f"kd_ratio={self.kd_ratio} must be 1 with weighting='mix', which sets the ratio itself")

    def learning_rate(self, step: int, steps: int) -> float:
        """Learning rate of step 0 … `steps` − 1: linear warm-up, then lr·(1 + cos πx)/2 with x in [0, 1)."""
        warm = round(self.warmup * steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
