"""A pruned model through llama.cpp's own converter, and back: E3_LLAMA_CPP names a checkout of llama.cpp."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from e3pruner import PruningPlan, prune
from e3pruner.models import load_smollm2

LLAMA_CPP = os.environ.get("E3_LLAMA_CPP")


@pytest.mark.slow
@pytest.mark.skipif(LLAMA_CPP is None, reason="E3_LLAMA_CPP is not set; it should name a checkout of llama.cpp")
def test_the_converted_model_has_the_logits_of_the_pruned_one(tmp_path: Path) -> None:
    model, tokenizer = load_smollm2(torch.float32)
    pruned = prune(model, PruningPlan.of_removed([4, 5, 13, 14, 16, 17, 18, 25], 30))
    for part in (pruned, tokenizer):
        part.save_pretrained(tmp_path / "pruned")
    converter = Path(str(LLAMA_CPP)) / "convert_hf_to_gguf.py"
    target = ["--outfile", tmp_path / "pruned.gguf", "--outtype", "f32"]
    subprocess.run([sys.executable, converter, tmp_path / "pruned", *target], check=True, timeout=600)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="pruned.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    assert read.config.num_hidden_layers == 22
    ids = torch.randint(0, 49_152, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = pruned(ids).logits, read(ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
