"""What a request asks for, from keyword arguments and a GenerationConfig, in the terms of the compiled loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

# Options of GenerationConfig that choose nothing where one greedy or sampled sequence is made for each prompt.
WITHOUT_EFFECT = frozenset(
    [
        *("early_stopping", "length_penalty", "low_memory", "diversity_penalty", "renormalize_logits"),
        *("bos_token_id", "decoder_start_token_id", "is_assistant", "transformers_version"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
        *("cache_config", "max_cache_len", "prefill_chunk_size", "compile_config", "disable_compile"),
        *("continuous_batching_config", "speculation_type"),
    ]
)
# The values of the other options that choose nothing, beside None and False.
_NEUTRAL = {
    "use_cache": True,
    "cache_implementation": "dynamic",
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": 0.0,
}
_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Options:
    """The options of a request, named and meant as in GenerationConfig; the defaults are the runtime's."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    stop_strings: str | Sequence[str] | None = None

    @property
    def eos(self) -> list[int]:
        """The tokens that end a sequence."""
        eos = self.eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    @property
    def pad(self) -> int:
        """What a sequence that has ended emits."""
        return self.pad_token_id if self.pad_token_id is not None else next(iter(self.eos), 0)


HONOURED = frozenset([field.name for field in fields(Options)]) | {"max_length", "min_length"}


def resolve(
    model: PreTrainedModel, config: GenerationConfig | None, given: dict[str, Any], prompt: int, limit: int
) -> Options:
    """The options of a request over `prompt` tokens: those of `given` that are not None, then those of `config`.

    What `config` leaves open is as in Hugging Face's `generate`: the model's own generation config, then the general
    defaults (20 new tokens, top_k=50). Without a `config` it is the runtime's own defaults, and of the model's
    generation config only its end and padding tokens.

    Raises TypeError for a `config` of another kind, ValueError for options that the runtime does not have and for
    lengths that cannot be: no new token, more than the model's `limit` of positions, a minimum beyond the maximum.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if config is None:
        own = model.generation_config
        options = Options(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    else:
        options = _options_of(model, config, given, prompt, limit)
    options = replace(options, **given)
    _check_lengths(options, prompt, limit)
    return options


def _options_of(
    model: PreTrainedModel, config: GenerationConfig, given: dict[str, Any], prompt: int, limit: int
) -> Options:
    if not isinstance(config, GenerationConfig):
        raise TypeError(f"generation_config is a {type(config).__name__}; it must be a transformers GenerationConfig")
    merged, _ = model._prepare_generation_config(config)  # type: ignore[operator]
    _refuse_others(merged)
    sampled = given.get("do_sample", merged.do_sample)
    values = {
        field.name: getattr(merged, field.name)
        for field in fields(Options)
        if getattr(merged, field.name) is not None and (sampled or field.name not in _SAMPLING_ONLY)
    }
    if merged.max_new_tokens is None and "max_new_tokens" not in given:
        by_default = config.max_length is None and model.generation_config.max_length is None
        values["max_new_tokens"] = min(merged.max_length, limit - prompt) if by_default else merged.max_length - prompt
        if values["max_new_tokens"] < 1:
            raise ValueError(f"max_length is {merged.max_length}; the prompt has {prompt} tokens already")
    if merged.min_new_tokens is None:
        values["min_new_tokens"] = max(0, merged.min_length - prompt)
    return Options(**values)


def _refuse_others(config: GenerationConfig) -> None:
    """Attributes that GenerationConfig does not know are the model's notes, which `generate` does not read either."""
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    refused = {name: getattr(config, name) for name in known if not _is_neutral(name, getattr(config, name))}
    if refused:
        listed = ", ".join(f"{name}={value!r}" for name, value in refused.items())
        raise ValueError(
            f"generation_config has {listed}, which LayerSkipRuntime.generate does not do; "
            "model.generate(custom_generate=runtime) decodes by Hugging Face's own methods"
        )


def _is_neutral(name: str, value: Any) -> bool:
    if name in HONOURED or name in WITHOUT_EFFECT or value is None:
        return True
    return value == _NEUTRAL[name] if name in _NEUTRAL else value is False


def _check_lengths(options: Options, prompt: int, limit: int) -> None:
    new = options.max_new_tokens
    if new < 1:
        raise ValueError(f"max_new_tokens is {new}; it must be at least 1")
    if prompt + new - 1 > limit:
        raise ValueError(f"{prompt} prompt tokens and max_new_tokens={new} exceed the model's {limit}")
    if options.min_new_tokens > new:
        raise ValueError(f"min_new_tokens is {options.min_new_tokens}; max_new_tokens is {new}")
