"""Hugging Face's own generation on top of the runtime: only the model's forward pass and cache are replaced."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.utils import GENERATION_MODES_MAPPING
from transformers.modeling_outputs import CausalLMOutputWithPast

from e3pruner.compat import CACHE

if TYPE_CHECKING:
    import e3kernels._runtime as _runtime
    from e3pruner.runtime.layer_skip import LayerSkipRuntime


_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__


class RuntimeCache(Cache):
    """The runtime's cache under the interface that generation uses; the keys and values stay in C++."""

    is_compileable = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.native: _runtime.Cache | None = None  # made by the first forward pass, which knows batch and padding

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.native is None else self.native.length

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.native is not None:
            self.native.select(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        if self.native is not None:
            self.native.truncate(self.native.length - abs(tokens_to_remove))

    def activate_past_recording(self) -> None:
        """Nothing to do: no past state is ever dropped."""


def generate_with_runtime(
    runtime: LayerSkipRuntime, input_ids: torch.Tensor, *, generation_config: GenerationConfig, **kwargs: Any
) -> Any:
    """Runs the decoding method of `generation_config` on a view of the model whose forward pass is the runtime's.

    Raises ValueError for what the runtime does not compute (attentions, hidden states) or a cache that is not empty.
    """
    if generation_config.output_attentions or generation_config.output_hidden_states:
        raise ValueError("output_attentions and output_hidden_states must be off: LayerSkipRuntime computes neither")
    cache = kwargs.get(CACHE)
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(f"{CACHE} already holds tokens; LayerSkipRuntime starts from an empty cache")
    if kwargs.get("use_cache", True):
        kwargs[CACHE] = RuntimeCache()
    kwargs["streamer"] = _streamer_of_generate()
    view = _view_of(runtime)
    method = GENERATION_MODES_MAPPING[generation_config.get_generation_mode(kwargs.get("assistant_model"))]
    return getattr(view, method)(input_ids, generation_config=generation_config, **kwargs)


def _streamer_of_generate() -> Any:
    """The `streamer` argument of the `generate` call that runs this hook.

    transformers (5.23) gives it to its own decoding methods only: a callable gets every other argument. It would be
    dropped without a word, so it is read where it is.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_code is not _GENERATE:
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else frame.f_locals["streamer"]


def _view_of(runtime: LayerSkipRuntime) -> Any:
    """An object that is the model in everything but its forward pass."""

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        cache = kwargs.pop(CACHE, None)
        cache = RuntimeCache() if cache is None else cache
        refused = sorted(name for name, value in kwargs.items() if value is not None and value is not False)
        if refused:
            raise ValueError(f"LayerSkipRuntime does not take the model arguments {refused}")
        if cache.native is None:
            cache.native = runtime.new_cache(input_ids.shape[0], attention_mask)
        _check_positions(cache.native, position_ids, input_ids.shape[1])
        logits = runtime.append(cache.native, input_ids, logits_to_keep or input_ids.shape[1])
        kept: Any = {CACHE: cache} if use_cache else {}
        return CausalLMOutputWithPast(logits=logits, **kept)

    model = runtime.model
    kind = type(f"{type(model).__name__}OnRuntime", (type(model),), {"forward": forward})
    view: Any = object.__new__(kind)
    object.__setattr__(view, "__dict__", model.__dict__)
    return view


def _check_positions(cache: _runtime.Cache, position_ids: torch.Tensor | None, count: int) -> None:
    if position_ids is None:
        return
    slots = torch.arange(cache.length, cache.length + count)
    expected = (slots - torch.tensor(cache.starts)[:, None]).clamp_min(0)
    if not torch.equal(position_ids.cpu().expand_as(expected), expected):
        raise ValueError("position_ids must count from the left padding; LayerSkipRuntime takes no others")
