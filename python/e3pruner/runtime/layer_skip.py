"""Generation with the kept layers of a Hugging Face model in C++, over the model's own weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from e3kernels.profiling import named_range
from e3kernels.runtime_module import load_or_build
from e3pruner.models.stack import check_indices
from e3pruner.runtime.generate_hook import generate_with_runtime
from e3pruner.runtime.listener import TokenListener
from e3pruner.runtime.options import Options, resolve
from e3pruner.runtime.prompt import check_prompt, padding
from e3pruner.runtime.unchanged import Unchanged

if TYPE_CHECKING:
    import e3kernels._runtime as _runtime

Keep = Sequence[int] | Mapping[str, Sequence[int]]


class LayerSkipRuntime:
    """Runs the layers `keep` of `model` without Python in the loop.

    The runtime shares the model's parameters: a change of their values is seen, any other change of the model makes the
    next request raise RuntimeError. On a CPU, steps of up to 16 tokens (decoding, small batches, verification of
    drafts) run in fused kernels with fp32 accumulation; on CUDA, steps of up to 8 in a captured graph; longer prompts
    and other devices through ATen (`path` says which, and why).

    `keep` lists the layers to run, by index, in any order; None keeps all. A mapping {"attention": [...], "mlp": [...]}
    keeps the two blocks of a layer separately. It can be set between requests at no cost: only kept layers read weights
    and hold keys and values. A request keeps the layers it began with.

    `model.generate(..., custom_generate=runtime)` runs Hugging Face's own generation (logits processors, streamers,
    beam search) on top of the runtime.

    Raises ImportError where `e3kernels._runtime` is not built and cannot be, ValueError or TypeError for a model that
    cannot be run exactly (the message says why), RuntimeError for one in training mode, with hooks, patched forwards or
    released memory, ValueError for an empty, repeated or out-of-range `keep`.
    """

    def __init__(self, model: PreTrainedModel, keep: Keep | None = None) -> None:
        self._native = load_native()
        from e3pruner.runtime.decoder_description import describe  # imports the compiled module

        self.model = model
        self.speculation: _runtime.SpeculationCounts | None = None  # experimental: of the last request that had a draft
        self._description = describe(model)
        self._decoder = self._native.Decoder(self._description)
        self._cache_of = [layer.cache_of for layer in self._description.layers]
        whole_or_part = ((True, True), (True, False), (False, True))  # attention and MLP
        self._choices = [
            {blocks: self._native.KeptLayer(index, *blocks) for blocks in whole_or_part}
            for index in range(len(self._description.layers))
        ]
        self._unchanged = Unchanged(model, self._description)
        self._running, self._lock = 0, threading.Lock()
        self.keep = keep

    @property
    def keep(self) -> list[int] | dict[str, list[int]]:
        """The layers that new requests run; a mapping where some layers keep only one of their blocks."""
        if all(kept.attention and kept.mlp for kept in self._plan):
            return [kept.layer for kept in self._plan]
        return {block: [kept.layer for kept in self._plan if getattr(kept, block)] for block in ("attention", "mlp")}

    @keep.setter
    def keep(self, keep: Keep | None) -> None:
        plan = self.plan(keep)
        with self._lock:
            if self._running:
                raise RuntimeError("keep was set while a request of this runtime runs; set it between requests")
            self._plan = plan

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
        for layer in sorted(attention):
            if self._cache_of[layer] not in {-1, *attention}:
                producer = self._cache_of[layer]
                raise ValueError(f"keep has layer {layer}, which reads the keys of layer {producer}, and not that one")
        return [self._choices[layer][layer in attention, layer in mlp] for layer in sorted(attention | mlp)]

    @property
    def device(self) -> torch.device:
        """Where the model's weights are; input ids may be on the CPU whatever it is."""
        return self.model.device

    @property
    def path(self) -> str:
        """What runs a step of a few tokens, and why: "fused CPU kernels", "CUDA graph: …" or "ATen: …"."""
        return str(self._decoder.path)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrices that one decoding step reads with the present `keep`, the output head included."""
        return int(self._decoder.weight_bytes(self._plan))

    def new_cache(
        self, batch: int = 1, attention_mask: torch.Tensor | None = None, *, capacity: int = 0
    ) -> _runtime.Cache:
        """An empty key/value cache for `batch` sequences of the layers that are kept now.

        `attention_mask` (batch, S) marks left padding with zeros, of the whole prompt where that is appended in chunks;
        `capacity` slots are allocated at once (it grows). Raises RuntimeError for a model that was changed.
        """
        self._unchanged.check()
        return self.empty_cache(batch, attention_mask, capacity)

    def empty_cache(self, batch: int, attention_mask: torch.Tensor | None, capacity: int = 0) -> _runtime.Cache:
        """`new_cache` inside a request, which has looked at the model when it began."""
        starts = None if attention_mask is None else padding(attention_mask, batch)
        cache: _runtime.Cache = self._decoder.new_cache(self._plan, batch, capacity)
        if starts is not None:
            cache.set_starts(starts)
        return cache

    def append(self, cache: _runtime.Cache, input_ids: torch.Tensor, logits_to_keep: int = 1) -> torch.Tensor:
        """Runs `input_ids` (batch, S), int64, after what `cache` holds.

        Returns the logits of the last `logits_to_keep` tokens, (batch, logits_to_keep, V), fp32. Raises ValueError for
        ids outside the vocabulary, another batch size, or a context beyond the model's.
        """
        with named_range("runtime append"):
            logits: torch.Tensor = self._decoder.append(cache, input_ids, logits_to_keep)
            return logits

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        streamer: BaseStreamer | None = None,
        draft_keep: Keep | None = None,
    ) -> torch.Tensor:
        """Continues `input_ids` (batch, S), int64, by up to `max_new_tokens` (128) tokens: (batch, S + new) ids.

        The logits pass `repetition_penalty`, `no_repeat_ngram_size` (0: off), and `min_new_tokens`, before which no
        sequence ends at `eos_token_id` (default: the model's generation config). The largest is taken, unless
        `do_sample`: then they pass `temperature`, `top_k` (0: all), `top_p`, `min_p`, in Hugging Face's order, and a
        draw depends on (`seed`, sequence, step) only. A sequence also ends once its new text holds one of
        `stop_strings` (needs `tokenizer`), and emits `pad_token_id` while others go on. Padding is on the left, zeros
        of `attention_mask`; no processor sees it.

        `generation_config` gives the options that are not given here; what it leaves open is as in Hugging Face's
        `generate`, and an option that the runtime does not have is refused by its name.

        `draft_keep` (experimental: no model has shown a gain yet), a part of the kept layers, drafts for
        self-speculative decoding of one sequence: greedy text is identical, sampled text equally distributed;
        `self.speculation` then counts drafted and accepted tokens.

        Raises ValueError for a bad argument or a context that would exceed the model's, RuntimeError for a model in
        training mode or one that was changed, and for logits that are not finite or leave no token.
        """
        check_prompt(input_ids, attention_mask)
        given = {
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "no_repeat_ngram_size": no_repeat_ngram_size,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "stop_strings": stop_strings,
        }
        batch, length = input_ids.shape
        options = resolve(self.model, generation_config, given, length, self._description.max_positions)
        request = self._native_request(options, seed)
        on_tokens = TokenListener.make(batch, options.stop_strings, tokenizer, streamer)
        with self._request():
            draft = None if draft_keep is None else self._draft_plan(draft_keep)
            cache = self.empty_cache(batch, attention_mask, length + options.max_new_tokens)
            if streamer is not None:
                streamer.put(input_ids)
            with named_range("runtime generate" if draft is None else "runtime speculate"):
                if draft is None:
                    rows = self._decoder.generate(cache, input_ids, request, on_tokens)
                else:
                    rows, self.speculation = self._decoder.speculate(cache, draft, input_ids, request, on_tokens)
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
        """A request: the model is looked at once, and `keep` stays as it is until the last of them has ended."""
        self._unchanged.check()
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1

    def _native_request(self, options: Options, seed: int) -> _runtime.Request:
        request: _runtime.Request = self._native.Request(
            max_new_tokens=options.max_new_tokens,
            min_new_tokens=options.min_new_tokens,
            eos=options.eos,
            pad=options.pad,
            sample=options.do_sample,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            seed=seed,
        )
        return request

    def _draft_plan(self, draft_keep: Keep) -> list[_runtime.KeptLayer]:
        draft = self.plan(draft_keep)
        kept = {layer.layer: layer for layer in self._plan}
        for layer in draft:
            full = kept.get(layer.layer)
            if full is None or layer.attention > full.attention or layer.mlp > full.mlp:
                raise ValueError(f"draft_keep has layer {layer.layer}, which keep has not; a draft is a part of keep")
        return draft


def load_native() -> Any:
    """The compiled module `e3kernels._runtime`, built now if it must be; ImportError says why it cannot be."""
    try:
        return load_or_build()
    except ImportError as error:
        raise ImportError(f"LayerSkipRuntime needs a compiled module: {error}") from error
