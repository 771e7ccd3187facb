"""The two halves of a causal language model: hidden states up to the output head, and the head itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from e3pruner.models.stack import calling, decoder_of, evaluating, returning_dicts, speaker_of
from e3pruner.models.streaming import named_weights

# Settings that multiply the logits (1) or divide them (-1).
_FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1, "logits_scaling": -1}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_TILE_LOGITS = 2**24
_VERIFIED: WeakKeyDictionary[PreTrainedModel, float] = WeakKeyDictionary()  # the factor that was found


@dataclass(frozen=True)
class OutputHead:
    """logits = softcap·tanh(z / softcap), z = scale·(x·weightᵀ + bias); without the tanh where softcap is None.

    `weight` (V, H) and `bias` (V,) or None are the model's own parameters, not copies; the weight of a head that scales
    each logit by a learnt factor of its own is the product, through which gradients reach both.
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
    """The hidden states (B, T, H) that the output head receives; no cache is kept.

    `input_ids` (B, T) integers; `attention_mask` (B, T), 1 for tokens and 0 for padding, on any side; `position_ids`
    (B, T) of packed documents, each counted from 0; `inputs`: what else `model` takes, such as the pixels of images.

    Pixels and other numbers of `inputs` are read in the dtype of the weights, as towers read them that do not cast.

    It is what the model's own forward pass hands to the head, whatever lies between the layers and it: a norm, a
    factor, BERT's transform. Raises `ValueError` where the head is not called with (B, T, H).
    """
    inputs = in_dtype_of(model, inputs) | position_arguments(model, attention_mask, position_ids, beside=bool(inputs))
    with returning_dicts(model), without_head(model) as received:
        try:
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)
        except IndexError:  # of a model that writes into columns of the logits (Chameleon)
            if not received:
                raise
    hidden = only_hidden(model, received)
    if inputs:
        check_per_token(model, hidden, input_ids)
    return hidden


@contextmanager
def without_head(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Inside the block the output head gives one column in place of the logits; what it receives is appended."""
    received: list[Tensor] = []

    def note(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        received.append(hidden)
        return hidden[..., :1]

    with calling(model.get_output_embeddings(), note):
        yield received


def check_per_token(model: PreTrainedModel, hidden: Tensor, input_ids: Tensor | None) -> None:
    """Raises ValueError for a model that reads an image beside `input_ids` (B, T) and predicts other than per token."""
    if input_ids is not None and hidden.shape[1] != input_ids.shape[1]:
        raise ValueError(
            f"model ({model.config.model_type}) predicts at {hidden.shape[1]} places for {input_ids.shape[1]} tokens "
            "and what stands beside them: which are those of the tokens is not known; give it text alone"
        )


def only_hidden(model: PreTrainedModel, received: list[Tensor]) -> Tensor:
    """The one hidden state (B, T, H) that the head received in a forward pass; of several streams of them (B, n, T, H),
    as ProphetNet has to predict n tokens, the first, which predicts the next."""
    if len(received) == 1 and received[0].dim() == 4:
        return received[0][:, 0]
    if len(received) != 1 or received[0].dim() != 3:
        shapes = [tuple(each.shape) for each in received]
        raise ValueError(
            f"model ({model.config.model_type}): its output head is not called once on (batch, tokens, width), but on "
            f"{shapes}; such a head is not supported"
        )
    return received[0]


def in_dtype_of(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` with all floating-point tensors in the dtype of the weights of `model`."""
    floating = {n for n, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return {n: value.to(model.dtype) if n in floating else value for n, value in inputs.items()}


def position_arguments(
    model: PreTrainedModel, attention_mask: Tensor | None, position_ids: Tensor | None, *, beside: bool = False
) -> dict[str, Tensor]:
    """What tells `model` where its tokens stand: `position_ids` as given, else counted over the tokens of
    `attention_mask` (B, T), so that padding on the left shifts none. Nothing without either, nor for a model that finds
    positions by its mask alone (ALiBi), nor where it takes them from what it is given `beside` the tokens: rows and
    columns of an image.
    """
    if position_ids is None and beside and any(hasattr(module, "get_rope_index") for module in model.modules()):
        return {}
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
    linear = model.get_output_embeddings()
    if not linear.weight.is_floating_point():
        raise ValueError(f"model ({model.config.model_type}): its output head is quantised ({linear.weight.dtype})")
    if model not in _VERIFIED:
        _VERIFIED[model] = _factor(model)
    return OutputHead(_weight(model), getattr(linear, "bias", None), _softcap(model), _VERIFIED[model])


def _weight(model: PreTrainedModel) -> Tensor:
    linear = model.get_output_embeddings()
    weight: Tensor = linear.weight
    factors = getattr(linear, "logit_scale", None)  # (V,): Dory's
    return weight if factors is None else weight * (factors * linear.logit_scale_factor)[:, None]


def _softcap(model: PreTrainedModel) -> float | None:
    config = model.config.get_text_config(decoder=True)
    return next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None))), None)


@torch.no_grad()
def _factor(model: PreTrainedModel) -> float:
    """What the logits are scaled by behind the head: the product of the settings that some types apply before it."""
    config = model.config.get_text_config(decoder=True)
    linear, softcap = model.get_output_embeddings(), _softcap(model)
    factors = [(getattr(config, name, None), exponent) for name, exponent in _FACTORS.items()]
    product = math.prod(factor**exponent for factor, exponent in factors if isinstance(factor, int | float))
    ids = torch.arange(8, device=linear.weight.device)[None] % linear.weight.shape[0]
    received: list[Tensor] = []
    speaker = speaker_of(model)
    with evaluating(speaker), returning_dicts(speaker), calling(linear, partial(_noting, received, linear.forward)):
        expected = speaker(input_ids=ids, use_cache=False).logits.float()
    hidden = only_hidden(model, received)
    # A missed factor changes logits by its own size; rounding in the order of operations by a few ulp.
    tolerance = 8 * torch.finfo(linear.weight.dtype).eps * expected.abs().max()
    errors = []
    for factor in (float(product), 1.0):
        rebuilt = OutputHead(_weight(model), getattr(linear, "bias", None), softcap, factor).logits(hidden).float()
        errors.append((rebuilt - expected).abs().max() if rebuilt.shape == expected.shape else math.inf)
        if errors[-1] <= tolerance:
            return factor
    check_finite(model, expected)
    raise ValueError(
        f"model ({config.model_type}): its logits are not softcap(scale·(hidden·weightᵀ + bias)), rebuilt ones differ "
        f"by {min(errors):.3g}; its output head is not supported"
    )


def _noting(received: list[Tensor], own: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    received.append(hidden)
    return own(hidden)


def check_finite(model: PreTrainedModel, logits: Tensor) -> None:
    """Raises ValueError if `logits` of `model` are not finite, naming the weight that is to blame."""
    if logits.isfinite().all():
        return
    blame = ", though all its weights are"
    for name, weight in (each for part in named_weights(model) for each in part.items()):
        if count := weight.numel() - int(weight.isfinite().sum()):
            values = "1 value that is" if count == 1 else f"{count:,} values that are"
            blame = f": {name} holds {values} NaN or infinite, of {weight.numel():,}"
            break
    raise ValueError(f"model ({model.config.model_type}): its logits are not finite{blame}")
