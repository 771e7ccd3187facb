"""Decoding one sequence: the layer-skipping runtime, all layers kept, beside Hugging Face's `generate`."""

from functools import cache
from typing import Any

import torch

from bench.gpu.contestants import Contest, Step

TOKENS = 32


def _sizes(small: bool) -> tuple[int, ...]:
    """Width, inner width, layers, heads, key/value heads, vocabulary."""
    return (64, 128, 2, 4, 2, 512) if small else (2048, 8192, 16, 32, 8, 128256)


@cache
def _model(device: torch.device, small: bool) -> Any:
    import transformers

    names = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        "vocab_size",
    )
    config = transformers.LlamaConfig(**dict(zip(names, _sizes(small), strict=True)), eos_token_id=None)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def _steps(device: torch.device, small: bool, length: int) -> dict[str, Step]:
    from e3pruner.runtime.layer_skip import LayerSkipRuntime

    model = _model(device, small)
    ids = torch.randint(1, model.config.vocab_size, (1, length), device=device)
    runtime, half = LayerSkipRuntime(model), range(0, model.config.num_hidden_layers, 2)

    def ours(keep: range | None) -> Step:
        def step() -> None:
            runtime.keep = None if keep is None else list(keep)
            runtime.generate(ids, max_new_tokens=TOKENS)

        return step

    def theirs() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)

    return {"e3pruner": ours(None), "e3pruner, half of the layers": ours(half), "transformers": theirs}


def decoding_contest(device: torch.device, small: bool = False) -> dict[str, Contest]:
    """Prompts of two lengths and 32 new tokens; the floor is the weights' bytes, once a token."""
    width, inner, layers, heads, key_value_heads, vocabulary = _sizes(small)
    block = 2 * width * width + 2 * width * width * key_value_heads // heads + 3 * width * inner
    bytes_read = 2 * (layers * block + vocabulary * width) * TOKENS
    return {
        f"decoding {TOKENS} tokens after {length}": Contest(
            lambda length=length: _steps(device, small, length), bytes=bytes_read
        )
        for length in ((8,) if small else (32, 2000))
    }
