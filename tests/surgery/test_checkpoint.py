"""Checkpoints cut file by file: the same model as the one cut in memory, with the bytes that the tensors had."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import NUM_LAYERS, TINY_CONFIGS, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from e3pruner import PruningPlan, prune

KEPT, REMOVED = [1, 3, 4], [0, 2, 5]


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def saved(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **options) -> Path:
    tiny_model(model_type).to(dtype).save_pretrained(folder, **options)
    return folder


def header(file: Path) -> dict:
    content = file.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def stored(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor in a folder, by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in header(file).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = content[start + begin : start + end]
    return found


@pytest.mark.parametrize("model_type", [*TINY_CONFIGS, "gpt_neo", "ernie4_5_moe", "llama4_text", "qwen2_moe"])
def test_every_type_becomes_what_it_becomes_in_memory(model_type: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", model_type)
    plan = PruningPlan.of_removed(REMOVED, NUM_LAYERS)
    assert prune(folder, plan, out=tmp_path / "cut") == tmp_path / "cut"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = prune(model, plan)
    again, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "cut", attn_implementation="eager", output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = tiny_tokens()
    assert torch.equal(logits(again, ids), logits(expected, ids))
    assert again.config.to_dict() | {"_name_or_path": ""} == expected.config.to_dict() | {"_name_or_path": ""}
