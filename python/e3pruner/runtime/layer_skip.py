"""Generation with the kept layers of a Hugging Face model in C++, over the model's own weights."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from e3kernels.profiling import named_range
from e3pruner.models.stack import check_indices
from e3pruner.runtime.generate_hook import generate_with_runtime

if TYPE_CHECKING:
    import e3kernels._runtime as _runtime

Keep = Sequence[int] | Mapping[str, Sequence[int]]


class LayerSkipRuntime:
    """Runs the layers `keep` of `model` without Python in the loop.

    The runtime shares the model's parameters: a change of their values is seen, a change of their dtype, device or
    identity makes the next request raise RuntimeError. On a CPU, steps of up to 16 tokens (decoding, small batches,
    verification of drafts) run in fused kernels with fp32 accumulation; longer prompts and other devices through ATen.

    `keep` lists the layers to run, by index, in any order; None keeps all. A mapping {"attention": [...], "mlp": [...]}
    keeps the two blocks of a layer separately. It can be set between requests at no cost: only kept layers read weights
    and hold keys and values. A request keeps the layers it began with.

    `model.generate(..., custom_generate=runtime)` runs Hugging Face's own generation (logits processors, streamers,
    beam search) on top of the runtime.

    Raises ImportError where `e3kernels._runtime` is not built, ValueError or TypeError for a model that cannot be run
    exactly (the message says why), ValueError for an empty, repeated or out-of-range `keep`.
    """

    def __init__(self, model: PreTrainedModel, keep: Keep | None = None) -> None:
        self._native = load_native()
        from e3pruner.runtime.decoder_description import describe  # imports the compiled module

        self.model = model
        self.speculation: _runtime.SpeculationCounts | None = None  # of the last request that had a draft
        self._description = describe(model)
        self._decoder = self._native.Decoder(self._description)
        whole_or_part = ((True, True), (True, False), (False, True))  # attention and MLP
        self._choices = [
            {blocks: self._native.KeptLayer(index, *blocks) for blocks in whole_or_part}
            for index in range(model.config.num_hidden_layers)
        ]
        self._parameters = [
            (f"{prefix}.{name}" if prefix else name, module._parameters, name, parameter)
            for prefix, module in model.named_modules()
            for name, parameter in module._parameters.items()
        ]
        self._modules = list(model.named_modules())
        self._running = 0
        self._check_model()
        self.keep = keep

    @property
    def keep(self) -> list[int] | dict[str, list[int]]:
        """The layers that new requests run; a mapping where some layers keep only one of their blocks."""
        if all(kept.attention and kept.mlp for kept in self._plan):
            return [kept.layer for kept in self._plan]
        return {block: [kept.layer for kept in self._plan if getattr(kept, block)] for block in ("attention", "mlp")}

    @keep.setter
    def keep(self, keep: Keep | None) -> None:
        if self._running:
            raise RuntimeError("keep was set while a request of this runtime runs; set it between requests")
        self._plan = self.plan(keep)

    def plan(self, keep: Keep | None) -> list[_runtime.KeptLayer]:
        """`keep` as the compiled runtime takes it: the kept layers in ascending order."""
        count = len(self._choices)
        if isinstance(keep, Mapping):
            if set(keep) != {"attention", "mlp"}:
                raise ValueError(f"keep has the keys {sorted(keep)}; a mapping has 'attention' and 'mlp'")
            attention, mlp = (set(check_indices("keep", keep[block], count)) for block in ("attention", "mlp"))
        else:
            attention = mlp = set(range(count) if keep is None else check_indices("keep", keep, count))
        if not attention | mlp:
            raise ValueError(f"keep is empty; the model has layers 0 to {count - 1} and at least one must stay")
        return [self._choices[layer][layer in attention, layer in mlp] for layer in sorted(attention | mlp)]

    @property
    def device(self) -> torch.device:
        """Where the model's weights are; input ids may be on the CPU whatever it is."""
        return self.model.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrices that one decoding step reads with the present `keep`, the output head included."""
        return self._decoder.weight_bytes(self._plan)

    def new_cache(
        self, batch: int = 1, attention_mask: torch.Tensor | None = None, *, capacity: int = 0
    ) -> _runtime.Cache:
        """An empty key/value cache for `batch` sequences of the layers that are kept now.

        `attention_mask` (batch, S) marks left padding with zeros; `capacity` slots are allocated at once (it grows).
        """
        self._check_model()
        cache = self._decoder.new_cache(self._plan, batch, capacity)
        if attention_mask is not None:
            cache.set_starts(_padding(attention_mask))
        return cache

    def append(self, cache: _runtime.Cache, input_ids: torch.Tensor, logits_to_keep: int = 1) -> torch.Tensor:
        """Runs `input_ids` (batch, S), int64, after what `cache` holds.

        Returns the logits of the last `logits_to_keep` tokens, (batch, logits_to_keep, V), fp32. Raises ValueError for
        ids outside the vocabulary, another batch size, or a context beyond the model's.
        """
        with named_range("runtime append"):
            return self._decoder.append(cache, input_ids, logits_to_keep)

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        streamer: BaseStreamer | None = None,
        draft_keep: Keep | None = None,
    ) -> torch.Tensor:
        """Continues `input_ids` (batch, S), int64, by up to `max_new_tokens` tokens; returns (batch, S + new) ids.

        Greedy unless `do_sample`; then the logits pass `repetition_penalty`, `temperature`, `top_k` (0: all), `top_p`
        in Hugging Face's order; draws depend on (`seed`, sequence, step) only. A sequence ends at `eos_token_id`
        (default: the model's generation config) or once its new text holds one of `stop_strings` (needs `tokenizer`),
        and emits `pad_token_id` while others go on. Padding is on the left, zeros of `attention_mask`.

        `draft_keep`, a part of the kept layers, drafts for self-speculative decoding of one sequence: greedy text is
        identical, sampled text equally distributed; `self.speculation` then counts drafted and accepted tokens.

        Raises ValueError for a bad argument or a context that would exceed the model's, RuntimeError for a model in
        training mode or one whose weights were replaced or moved.
        """
        prompt = _checked_prompt(input_ids, attention_mask, max_new_tokens, self._description.max_positions)
        draft = None if draft_keep is None else self._draft_plan(draft_keep)
        eos = _eos_tokens(self.model, eos_token_id)
        request = self._native.Request(
            max_new_tokens=max_new_tokens,
            eos=eos,
            pad=_pad_token(self.model, pad_token_id, eos),
            sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        on_tokens = _TokenListener.make(prompt.shape[0], stop_strings, tokenizer, streamer)
        cache = self.new_cache(prompt.shape[0], attention_mask, capacity=prompt.shape[1] + max_new_tokens)
        if streamer is not None:
            streamer.put(prompt)
        with self._request(), named_range("runtime generate" if draft is None else "runtime speculate"):
            if draft is None:
                rows = self._decoder.generate(cache, prompt, request, on_tokens)
            else:
                rows, self.speculation = self._decoder.speculate(cache, draft, prompt, request, on_tokens)
        if streamer is not None:
            streamer.end()
        return torch.tensor(rows, dtype=torch.long, device=input_ids.device)

    def __call__(self, model: PreTrainedModel, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """The hook of `model.generate(..., custom_generate=runtime)`."""
        if model is not self.model:
            raise ValueError("custom_generate is a runtime of another model")
        with self._request():
            return generate_with_runtime(self, input_ids, **kwargs)

    @contextmanager
    def _request(self) -> Iterator[None]:
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def _draft_plan(self, draft_keep: Keep) -> list[_runtime.KeptLayer]:
        draft = self.plan(draft_keep)
        kept = {layer.layer: layer for layer in self._plan}
        for layer in draft:
            full = kept.get(layer.layer)
            if full is None or layer.attention > full.attention or layer.mlp > full.mlp:
                raise ValueError(f"draft_keep has layer {layer.layer}, which keep has not; a draft is a part of keep")
        return draft

    def _check_model(self) -> None:
        """Raises RuntimeError where `model` no longer computes what the runtime would."""
        for name, parameters, key, parameter in self._parameters:
            if parameters.get(key) is not parameter:
                raise RuntimeError(f"{name} was replaced since the runtime was built; build a new LayerSkipRuntime")
        self._description.check_unchanged()
        for name, module in self._modules:
            if module.training:
                raise RuntimeError(f"{name or 'model'} is in training mode; call model.eval() first")
            if module._forward_hooks or module._forward_pre_hooks:
                raise RuntimeError(f"{name or 'model'} has a forward hook, which the runtime would not run; remove it")


def load_native() -> Any:
    """The compiled module `e3kernels._runtime`; ImportError says why it is missing."""
    try:
        return importlib.import_module("e3kernels._runtime")
    except ImportError as error:
        raise ImportError(
            f"LayerSkipRuntime needs the compiled module e3kernels._runtime ({error}); `python -m e3kernels.info` says "
            "why it was not built"
        ) from error


def _padding(attention_mask: torch.Tensor) -> list[int]:
    """Left padding of every sequence; ValueError for a mask with zeros elsewhere."""
    mask = attention_mask.bool().cpu()
    starts = (~mask).sum(-1)
    expected = torch.arange(mask.shape[-1]) >= starts[:, None]
    if not torch.equal(mask, expected) or (starts == mask.shape[-1]).any():
        raise ValueError("attention_mask must be zeros (left padding) followed by at least one 1 in every row")
    return starts.tolist()


def _checked_prompt(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, max_new_tokens: int, limit: int
) -> torch.Tensor:
    if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.dtype != torch.long:
        raise ValueError(
            f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}; it must be int64 (batch, at least 1)"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; input_ids has {tuple(input_ids.shape)}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    prompt = input_ids.shape[1]
    if prompt + max_new_tokens - 1 > limit:
        raise ValueError(f"{prompt} prompt tokens and max_new_tokens={max_new_tokens} exceed the model's {limit}")
    return input_ids


def _eos_tokens(model: PreTrainedModel, eos_token_id: int | Sequence[int] | None) -> list[int]:
    eos = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _pad_token(model: PreTrainedModel, pad_token_id: int | None, eos: list[int]) -> int:
    for pad in (pad_token_id, model.generation_config.pad_token_id, *eos):
        if pad is not None:
            return pad
    return 0


class _TokenListener:
    """Called by the C++ loop after every step, only where there is a streamer or a stop string."""

    def __init__(
        self, batch: int, stop: list[str], tokenizer: PreTrainedTokenizerBase | None, streamer: BaseStreamer | None
    ) -> None:
        self.stop, self.tokenizer, self.streamer = stop, tokenizer, streamer
        # Every token but the first few of a character adds text: so many tokens hold the longest stop string.
        self.window = max((len(text.encode()) for text in stop), default=0) + 4
        self.tails: list[list[int]] = [[] for _ in range(batch)]

    @classmethod
    def make(
        cls,
        batch: int,
        stop_strings: str | Sequence[str] | None,
        tokenizer: PreTrainedTokenizerBase | None,
        streamer: BaseStreamer | None,
    ) -> _TokenListener | None:
        stop = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        if stop and tokenizer is None:
            raise ValueError("stop_strings needs tokenizer, which turns tokens into text")
        if any(not text for text in stop):
            raise ValueError("stop_strings holds an empty string, which every text contains")
        if streamer is not None and batch != 1:
            raise ValueError(f"streamer takes one sequence; input_ids has {batch}")
        return cls(batch, stop, tokenizer, streamer) if stop or streamer is not None else None

    def __call__(self, tokens: list[int]) -> list[bool] | None:
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens))
        if not self.stop or self.tokenizer is None:
            return None
        ended = []
        for tail, token in zip(self.tails, tokens, strict=True):
            tail.append(token)
            text = self.tokenizer.decode(tail[-self.window :])
            ended.append(any(stop in text for stop in self.stop))
        return ended
