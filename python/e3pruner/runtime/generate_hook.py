"""Hugging Face's own generation on top of the runtime: only the model's forward pass and cache are replaced."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GENERATION_MODES_MAPPING
from transformers.modeling_outputs import CausalLMOutputWithPast

from e3pruner.compat import CACHE
from e3pruner.runtime.model_calls import calls_go_to
from e3pruner.runtime.prompt import check_mask_shape

if TYPE_CHECKING:
    import e3kernels._runtime as _runtime
    from e3pruner.runtime.layer_skip import LayerSkipRuntime


_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__

# Options of GenerationConfig that need what the runtime does not compute or runs otherwise.
_REFUSED = {
    "output_attentions": "it computes no attention weights",
    "output_hidden_states": "it keeps no hidden states",
    "assistant_early_exit": "it would change the model's configuration, not the runtime's layers; "
    "runtime.generate(draft_keep=...) drafts with a part of them",
    "use_mtp": "it keeps no hidden states, which the draft needs",
    "speculation_type": "it keeps no hidden states, which the draft needs",
    "cache_implementation": "it has a cache of its own",
}


class RuntimeCache(Cache):
    """The runtime's cache under the interface that generation uses; the keys and values stay in C++."""

    is_compileable = False
    is_croppable = True

    def __init__(self, native: _runtime.Cache) -> None:
        super().__init__(layers=[])
        self.native = native

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.native.length

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.native.select(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        self.native.truncate(self.native.length - abs(tokens_to_remove))

    def activate_past_recording(self) -> None:
        """Nothing to do: no past state is ever dropped."""


def generate_with_runtime(
    runtime: LayerSkipRuntime,
    input_ids: torch.Tensor,
    *,
    generation_config: GenerationConfig,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    **kwargs: Any,
) -> Any:
    """Runs the decoding method of `generation_config` on a view of the model whose forward pass is the runtime's.

    A logits processor or stopping criterion that holds the model calls the view. Raises ValueError, which names the
    option, for what the runtime does not compute, RuntimeError for other calls of the model meanwhile.
    """
    arguments = _arguments_of_generate()
    assistant = arguments.get("assistant_model")
    method = _decoding_method(generation_config, assistant)
    _check_options(generation_config)
    _check_arguments(runtime, arguments)
    if kwargs.get("use_cache", True):
        # The whole prompt's padding: a chunk of the prompt may hold nothing else.
        kwargs[CACHE] = _empty_cache(runtime, input_ids, kwargs.get("attention_mask"))
    if assistant is not None:
        kwargs["assistant_model"] = assistant
    view = _view_of(runtime)
    with calls_go_to(view, runtime.model, [*logits_processor, *stopping_criteria]):
        return getattr(view, method)(
            input_ids,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=arguments.get("streamer"),
            **kwargs,
        )


def _arguments_of_generate() -> dict[str, Any]:
    """The arguments of the `generate` call that runs this hook.

    transformers (5.20 to 5.24) gives `streamer`, `assistant_model` and `synced_gpus` to its own decoding methods only:
    a callable gets the other arguments. They would be dropped without a word, so they are read where they are.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_code is not _GENERATE:
        frame = frame.f_back  # type: ignore[assignment]
    return {} if frame is None else frame.f_locals


def _decoding_method(config: GenerationConfig, assistant: Any) -> str:
    mode = config.get_generation_mode(assistant)
    method = GENERATION_MODES_MAPPING[mode]
    if "/" in method:  # by the options penalty_alpha, dola_layers, num_beam_groups, constraints, force_words_ids
        raise ValueError(
            f"the options ask for {mode.value}, which transformers loads as code from {method}; LayerSkipRuntime runs "
            "greedy search, sampling, beam search and assisted decoding"
        )
    return method


def _check_options(config: GenerationConfig) -> None:
    for name, reason in _REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value is not False and value != "dynamic":
            raise ValueError(f"{name} is {value!r}; LayerSkipRuntime does not take it: {reason}")


def _check_arguments(runtime: LayerSkipRuntime, arguments: dict[str, Any]) -> None:
    """What a callable is not given, or would have to fill in."""
    if arguments.get("synced_gpus"):
        raise ValueError("synced_gpus is set; LayerSkipRuntime runs on one device, in step with no other process")
    if arguments.get("kwargs", {}).get(CACHE) is not None:
        raise ValueError(f"{CACHE} was given; LayerSkipRuntime has a cache of its own and starts with an empty one")
    assistant = arguments.get("assistant_model")
    if assistant is None:
        return
    if assistant is runtime.model:
        raise ValueError(
            "assistant_model is the runtime's own model, which would run all its layers; "
            "runtime.generate(draft_keep=...) drafts with a part of them"
        )
    own, other = (model.config.get_text_config().vocab_size for model in (runtime.model, assistant))
    if own != other:
        raise ValueError(
            f"assistant_model has a vocabulary of {other}, the model one of {own}; LayerSkipRuntime takes an assistant "
            "with the same tokens"
        )


def _view_of(runtime: LayerSkipRuntime) -> Any:
    """An object that is the model in everything but its forward pass."""

    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        cache = kwargs.pop(CACHE, None)
        refused = sorted(name for name, value in kwargs.items() if value is not None and value is not False)
        if refused:
            raise ValueError(f"LayerSkipRuntime does not take the model arguments {refused}")
        if input_ids is None:
            raise ValueError("input_ids is None; LayerSkipRuntime runs tokens")
        if cache is None:
            cache = _empty_cache(runtime, input_ids, attention_mask)
        elif not isinstance(cache, RuntimeCache):
            raise ValueError(f"{CACHE} is a {type(cache).__name__}; LayerSkipRuntime has a cache of its own")
        _check_positions(cache.native, position_ids, input_ids.shape[1])
        logits = runtime.append(cache.native, input_ids, logits_to_keep or input_ids.shape[1])
        kept: Any = {CACHE: cache} if use_cache else {}
        return CausalLMOutputWithPast(logits=logits, **kept)

    model = runtime.model
    kind = type(f"{type(model).__name__}OnRuntime", (type(model),), {"forward": forward})
    view: Any = object.__new__(kind)
    object.__setattr__(view, "__dict__", model.__dict__)
    return view


def _empty_cache(
    runtime: LayerSkipRuntime, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> RuntimeCache:
    check_mask_shape(attention_mask, input_ids)
    return RuntimeCache(runtime.empty_cache(input_ids.shape[0], attention_mask))


def _check_positions(cache: _runtime.Cache, position_ids: torch.Tensor | None, count: int) -> None:
    if position_ids is None:
        return
    slots = torch.arange(cache.length, cache.length + count)
    expected = (slots - torch.tensor(cache.starts)[:, None]).clamp_min(0)
    if not torch.equal(position_ids.cpu().expand_as(expected), expected):
        raise ValueError("position_ids must count from the left padding; LayerSkipRuntime takes no others")
