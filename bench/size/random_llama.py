"""Writes a llama with random weights, larger than the memory it is made in: one layer at a time, one file per layer.

    python -m bench.size.random_llama FOLDER [--layers 16] [--hidden 5120] [--vocabulary 128256]

bf16, untied head, grouped attention; the tokenizer is SmolLM2's, whose ids a vocabulary of 49,152 or more holds.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from e3pruner.models.loading import copy_tokenizer

FILE = "model-{:05d}-of-{:05d}.safetensors"


def write(folder: Path, config: LlamaConfig) -> None:
    """Normal weights of standard deviation 0.02 and norms of one, as the model is initialised; seeded per file."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else name, []).append(name)
    where = {}
    for number, names in enumerate(parts.values(), 1):
        generator = torch.Generator().manual_seed(number)
        file = FILE.format(number, len(parts))
        tensors = {name: _weight(name, shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    size = 2 * sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    copy_tokenizer("smollm2", folder)
    print(f"{size / 2**30:.2f} GiB in {len(parts)} files")


def _weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--vocabulary", type=int, default=128256)
    given = parser.parse_args()
    config = LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 7 // 2,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 128,
        num_key_value_heads=max(1, given.hidden // 640),
        tie_word_embeddings=False,
    )
    write(given.folder, config)


if __name__ == "__main__":
    main()
