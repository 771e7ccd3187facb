"""The two halves of a causal language model: hidden states up to the output head, and the head itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from e3pruner.models.stack import evaluating, returning_dicts, stack_name

# Settings that multiply the logits (1) or divide them (-1).
_FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1, "logits_scaling": -1}
_TILE_LOGITS = 2**24
_VERIFIED: WeakSet[PreTrainedModel] = WeakSet()


@dataclass(frozen=True)
class OutputHead:
    """logits = softcap·tanh(z / softcap), z = scale·(x·weightᵀ + bias); without the tanh where softcap is None.

    `weight` (V, H) and `bias` (V,) or None are the model's own parameters, not copies.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    def arguments(self, role: str) -> dict[str, Any]:
        """What the linear losses of `e3kernels` are told of it as the "student" or the "teacher"."""
        return {f"{role}_{each.name}": getattr(self, each.name) for each in fields(self)}

    def detached(self) -> OutputHead:
        """This head without a gradient."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def to(self, dtype: torch.dtype) -> OutputHead:
        """This head with weight and bias in `dtype`: those of the model where they have it."""
        return replace(self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    def narrowed(self, vocabulary: int) -> OutputHead:
        """The head of the first `vocabulary` tokens: views, no copies; itself if it has no more."""
        if vocabulary == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:vocabulary]
        return replace(self, weight=self.weight[:vocabulary], bias=bias)

    def tiles(self, rows: int) -> list[slice]:
        """`rows` in parts whose logits may exist at a time: 64 MiB in fp32."""
        size = max(1, _TILE_LOGITS // self.weight.shape[0])
        return [slice(start, start + size) for start in range(0, rows, size)]

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits (..., V) of hidden states (..., H), in the dtype of the weight."""
        scaled = F.linear(hidden, self.weight, self.bias)
        if self.scale != 1:
            scaled = self.scale * scaled
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def last_hidden(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    """The hidden states (B, T, H) that the output head receives, after the final norm; no cache is kept.

    `input_ids` (B, T) integers; `attention_mask` (B, T), 1 for tokens and 0 for padding, on any side; `position_ids`
    (B, T) of packed documents, each counted from 0; `inputs`: what else the module that holds the layers takes.
    """
    inputs |= position_arguments(model, attention_mask, position_ids)
    with returning_dicts(model):
        output = decoder_of(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)
    hidden: Tensor = output.last_hidden_state
    return hidden


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that holds the decoder layers: from token ids to the hidden states that the output head receives."""
    return model.get_submodule(stack_name(model).rpartition(".")[0])


def position_arguments(
    model: PreTrainedModel, attention_mask: Tensor | None, position_ids: Tensor | None
) -> dict[str, Tensor]:
    """What tells `model` where its tokens stand: `position_ids` as given, else counted over the tokens of
    `attention_mask` (B, T), so that padding on the left shifts none. Nothing without either, nor for a model that finds
    positions by its mask alone (ALiBi).
    """
    if position_ids is None and attention_mask is not None:
        if "position_ids" not in inspect.signature(decoder_of(model).forward).parameters:
            return {}
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return {} if position_ids is None else {"position_ids": position_ids}


@torch.no_grad()
def check_packing(name: str, model: PreTrainedModel, hidden: Callable[..., Tensor] = last_hidden) -> None:
    """Raises ValueError naming `name` unless `model` keeps documents apart that are packed into one row.

    `hidden(model, input_ids, attention_mask, position_ids)` is how its hidden states are computed.
    """
    ids = torch.arange(12, device=model.device)[None] % output_head(model).weight.shape[0]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None].to(model.device)
    with evaluating(model):
        apart = hidden(model, ids[:, 5:], None, None).float()
        try:
            packed = hidden(model, ids, None, positions)[:, 5:].float()
        except TypeError as error:
            raise ValueError(f"{name} ({model.config.model_type}) takes no position_ids: {error}") from error
    if not (packed - apart).abs().max() <= 1e-2 * apart.abs().max():
        raise ValueError(f"{name} ({model.config.model_type}) attends across documents packed into one row")


def output_head(model: PreTrainedModel) -> OutputHead:
    """What turns `last_hidden(model, ...)` into the logits of `model`.

    A factor or a soft cap that goes unnoticed would silently change the objective of a fused loss. So the first call
    on a model rebuilds the logits of a few tokens, and raises `ValueError` if they are not those of the model.
    """
    config = model.config.get_text_config(decoder=True)
    factors = [(getattr(config, name, None), exponent) for name, exponent in _FACTORS.items()]
    scale = math.prod(factor**exponent for factor, exponent in factors if isinstance(factor, int | float))
    linear = model.get_output_embeddings()
    if not linear.weight.is_floating_point():
        raise ValueError(f"model ({model.config.model_type}): its output head is quantised ({linear.weight.dtype})")
    softcap = getattr(config, "final_logit_softcapping", None)
    head = OutputHead(linear.weight, getattr(linear, "bias", None), softcap, float(scale))
    if model not in _VERIFIED:
        _verify(model, head)
        _VERIFIED.add(model)
    return head


@torch.no_grad()
def _verify(model: PreTrainedModel, head: OutputHead) -> None:
    ids = torch.arange(8, device=head.weight.device)[None] % head.weight.shape[0]
    with evaluating(model), returning_dicts(model):
        expected = model(input_ids=ids, use_cache=False).logits.float()
        rebuilt = head.logits(last_hidden(model, ids)).float()
    # A missed factor changes logits by its own size; rounding in the order of operations by a few ulp.
    tolerance = 8 * torch.finfo(head.weight.dtype).eps * expected.abs().max()
    error = (rebuilt - expected).abs().max()
    if not error <= tolerance:
        check_finite(model, expected)
        raise ValueError(
            f"model ({model.config.model_type}): its logits are not softcap(scale·(hidden·weightᵀ + bias)), rebuilt "
            f"ones differ by {error:.3g}; its output head is not supported"
        )


def check_finite(model: PreTrainedModel, logits: Tensor) -> None:
    """Raises ValueError if `logits` of `model` are not finite, naming the weight that is to blame."""
    if logits.isfinite().all():
        return
    blame = ", though all its weights are"
    for name, weight in model.named_parameters():
        if count := weight.numel() - int(weight.isfinite().sum()):
            values = "1 value that is" if count == 1 else f"{count:,} values that are"
            blame = f": {name} holds {values} NaN or infinite, of {weight.numel():,}"
            break
    raise ValueError(f"model ({model.config.model_type}): its logits are not finite{blame}")
