"""Greedy decoding of every family that LayerSkipRuntime serves beside Llama's, against Hugging Face's `generate`.

    python bench/runtime/families.py [FAMILY ...] [--dtypes fp32 bf16] [--rounds N] [--size S] [--out FILE.jsonl]

Random models of about 1 GB in bf16 (`--size 0.01`: of a hundredth, to see that it runs). Rounds alternate between the
providers. In fp32 both must write the same tokens; in bf16 both round, so that the number of equal ones is recorded.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import Recorder, seconds_of, spread
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from e3pruner import LayerSkipRuntime

NEW, PROMPT = 64, 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_DENSE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_PLAIN = _DENSE | {"intermediate_size": 6144}  # two matrices instead of three
_ROUTED = _DENSE | {"num_hidden_layers": 12}
_FOUR_OF_SIXTEEN = {"moe_intermediate_size": 768, "num_experts_per_tok": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _DENSE,
    "qwen3_moe": _ROUTED | _FOUR_OF_SIXTEEN | {"num_experts": 16, "head_dim": 64, "norm_topk_prob": True},
    "mixtral": _ROUTED | {"num_local_experts": 8, "intermediate_size": 1536},
    "gpt_oss": _ROUTED
    | {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 768, "head_dim": 64}
    | {"sliding_window": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "phi": _PLAIN | {"hidden_act": "gelu_new"},
    "stablelm": _DENSE,
    "starcoder2": _PLAIN | {"use_bias": True},
    "cohere2": _DENSE | {"sliding_window": 512},
    "glm4": _DENSE | {"head_dim": 64},
    "gemma4_text": _DENSE | {"head_dim": 64, "global_head_dim": 128, "hidden_size_per_layer_input": 0},
    "deepseek_v3": _ROUTED
    | _FOUR_OF_SIXTEEN
    | {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "num_key_value_heads": 16}
    | {"kv_lora_rank": 256, "q_lora_rank": 384, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64},
    "lfm2": _DENSE | {"layer_types": ["conv", "conv", "full_attention"] * 8, "block_auto_adjust_ff_dim": False},
}
_SHRUNK = ("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size")


def random_model(family: str, dtype: torch.dtype, size: float) -> PreTrainedModel:
    """Weights so large that the greedy text does not repeat one token; `size` scales the number of parameters."""
    settings = dict(FAMILIES[family])
    for name in _SHRUNK:
        if name in settings:
            settings[name] = max(64, round(settings[name] * size**0.5 / 64) * 64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=1.0 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model.to(dtype)


def bench(record: Recorder, family: str, dtype: str, rounds: int, size: float) -> None:
    model = random_model(family, DTYPES[dtype], size)
    runtime = LayerSkipRuntime(model)
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    actions: dict[str, Callable[[], torch.Tensor]] = {
        "runtime": lambda: runtime.generate(ids, max_new_tokens=NEW),
        "huggingface": lambda: model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        ),
    }
    ours, theirs = (action()[0, PROMPT:] for action in actions.values())
    same = int((ours == theirs).sum())
    if dtype == "fp32" and same < NEW:
        raise AssertionError(f"{family} in fp32: {same} of {NEW} tokens are those of Hugging Face")
    times = dict(zip(actions, seconds_of(*actions.values(), rounds=rounds), strict=True))
    common = {"dtype": dtype, "gigabytes": sum(weight.nbytes for weight in model.parameters()) / 1e9}
    for provider, mine in times.items():
        ratio = statistics.median(other / own for other, own in zip(mine, times["runtime"], strict=True))
        figures = spread([NEW / seconds for seconds in mine]) | {"runtime_is_faster_by": ratio}
        record(f"family {family}", provider, **common, **figures, same_tokens=same, tokens=NEW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], default=[])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record = Recorder(options.out)
    for family in options.families or FAMILIES:
        for dtype in options.dtypes:
            bench(record, family, dtype, options.rounds, options.size)


if __name__ == "__main__":
    main()
