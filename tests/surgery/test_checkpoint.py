"""Checkpoints cut file by file: the same model as the one cut in memory, with the bytes that the tensors had."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sweep.shrink import small_config, small_model
from tiny_models import NUM_LAYERS, TINY_CONFIGS, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from e3pruner import PruningPlan, prune
from e3pruner.models import find_layers
from e3pruner.models.streaming import streamed_model
from e3pruner.surgery import checkpoint, shards
from e3pruner.surgery.shards import write_shards

KEPT, REMOVED = [1, 3, 4], [0, 2, 5]


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def saved(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **options) -> Path:
    tiny_model(model_type).to(dtype).save_pretrained(folder, **options)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Copies, so that the file may be written over."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


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
    expected.config.save_pretrained(tmp_path / "in memory")
    written = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("cut", "in memory")]
    assert written[0] == written[1]


@pytest.mark.parametrize("at_once", [1, 64, 4 << 20])
def test_a_tensor_with_a_block_per_layer_loses_those_of_removed_layers(at_once, tmp_path, monkeypatch) -> None:
    """Gemma's embeddings per layer lie beside the stack, (V, layers · width), their projection (layers · width, H)."""
    monkeypatch.setattr(shards, "_CHUNK", at_once)
    kept, folder = [1, 2, 3, 5], tmp_path / "dense"
    model = tiny_model("gemma4_text", hidden_size_per_layer_input=8).to(torch.bfloat16)
    model.save_pretrained(folder)
    prune(folder, kept, out=tmp_path / "cut")
    before, after = tensors_of(folder), tensors_of(tmp_path / "cut")
    for name, axis in [("model.embed_tokens_per_layer.weight", 1), ("model.per_layer_model_projection.weight", 0)]:
        blocks = before[name].unflatten(axis, (NUM_LAYERS, 8)).unbind(axis)
        assert torch.equal(after[name], torch.cat([blocks[layer] for layer in kept], dim=axis))
    in_memory = prune(model, kept).state_dict()
    assert all(torch.equal(tensor, in_memory[name]) for name, tensor in after.items())


def test_adapters_inside_shared_weights_are_renumbered(tmp_path: Path) -> None:
    """Zamba 2: one block serves layers 0 and 3, another 2 and 5, each with an adapter for every layer it serves."""
    folder, kept = tmp_path / "dense", [0, 1, 2, 3]
    model = small_model(small_config("zamba2"), AutoModelForCausalLM)
    model.save_pretrained(folder)
    prune(folder, kept, out=tmp_path / "cut")
    before, after = tensors_of(folder), tensors_of(tmp_path / "cut")
    name = "model.layers.{}.shared_transformer.self_attn.linear_q_adapter_list.{}.0.weight"
    assert [name.format(0, i) in before for i in range(4)] == [True, False, True, False]
    assert [name.format(0, i) in after for i in range(3)] == [True, False, True]
    assert name.format(2, 3) in before
    assert name.format(2, 3) not in after
    assert all(torch.equal(tensor, prune(model, kept).state_dict()[name]) for name, tensor in after.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kept_tensors_keep_their_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "qwen3_moe", dtype, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 4
    prune(folder, PruningPlan.of_removed(REMOVED, NUM_LAYERS), out=tmp_path / "cut")
    before, after = stored(folder), stored(tmp_path / "cut")
    moved = {}
    for name in before:
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        if layer is None:
            moved[name] = name
        elif layer in KEPT:
            moved[name] = name.replace(f"model.layers.{layer}.", f"model.layers.{KEPT.index(layer)}.")
    assert after == {new: before[old] for old, new in moved.items()}
    digests = json.loads((tmp_path / "cut" / "pruning.json").read_text())["checkpoint"]["sha256"]
    assert digests == {name: hashlib.sha256(content).hexdigest() for name, content in after.items()}
    assert PruningPlan.load(tmp_path / "cut" / "pruning.json") == PruningPlan.of_removed(REMOVED, NUM_LAYERS)

    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(map(len, after.values()))
    for file in files:
        with safe_open(file, "pt") as opened:
            assert {index["weight_map"][name] for name in opened.keys()} == {file.name}  # noqa: SIM118
            assert opened.metadata() == {"format": "pt"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cut").dtype == dtype


def test_every_tensor_begins_at_a_multiple_of_its_item(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "llama")
    tensors = tensors_of(folder)
    odd = {f"model.layers.{i}.self_attn.k_scale": torch.ones(1 + 2 * (i == 0), dtype=torch.uint8) for i in range(6)}
    # The library sorts by dtype; other writers do not.
    content, entries, data = {**odd, **tensors}, {}, b""
    for name, tensor in content.items():
        raw = tensor.numpy().tobytes()
        dtype = {torch.uint8: "U8", torch.float32: "F32"}[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    prune(folder, KEPT, out=tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
    for name, entry in header(file).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % {"U8": 1, "F32": 4}[entry["dtype"]] == 0
    assert (
        stored(tmp_path / "cut")["model.layers.1.mlp.up_proj.weight"]
        == tensors["model.layers.3.mlp.up_proj.weight"].numpy().tobytes()
    )


def with_prediction_layers(folder: Path, *layers: int) -> dict[str, torch.Tensor]:
    tensors = tensors_of(folder)
    more = {f"model.layers.{i}.{name}.weight": torch.randn(4, 4) for i in layers for name in ("eh_proj", "enorm")}
    save_file({**tensors, **more}, folder / "model.safetensors", {"format": "pt"})
    return more


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_layers_of_multi_token_prediction_follow_the_last_one(model_type: str, tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    config = small_config(model_type, num_nextn_predict_layers=1)
    small_model(config, AutoModelForCausalLM).save_pretrained(folder)
    more = with_prediction_layers(folder, 6)
    with pytest.warns(UserWarning, match=r"layers \[6\], of multi-token prediction, become \[3\]"):
        prune(folder, KEPT, out=tmp_path / "cut")
    cut = load_file(tmp_path / "cut" / "model.safetensors")
    assert torch.equal(cut["model.layers.3.eh_proj.weight"], more["model.layers.6.eh_proj.weight"])
    assert not any(name.startswith("model.layers.6.") for name in cut)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_layers_that_no_setting_speaks_of_are_left_out(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "deepseek_v3")
    with_prediction_layers(folder, 6, 7)
    with pytest.warns(UserWarning, match=r"layers \[7\] lie behind the 6 of the model, and num_nextn_predict_layers=1"):
        prune(folder, KEPT, out=tmp_path / "cut")
    names = load_file(tmp_path / "cut" / "model.safetensors")
    assert {name.split(".")[2] for name in names if name.startswith("model.layers.")} == {"0", "1", "2", "3"}


def test_what_was_never_there_is_not_announced(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "deepseek_v3")
    assert tiny_model("deepseek_v3").config.num_nextn_predict_layers == 1
    for pruned in (
        AutoModelForCausalLM.from_pretrained(prune(folder, KEPT, out=tmp_path / "cut")),
        prune(tiny_model("deepseek_v3"), KEPT),
    ):
        assert pruned.config.num_nextn_predict_layers == 0


@pytest.mark.parametrize("name", ["model.layers.3.odd.weight", "model.odd.weight", "score.weight"])
def test_a_tensor_of_no_known_place_is_refused(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "llama")
    tensors = tensors_of(folder)
    save_file({**tensors, name: torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor {name} belongs to no known place of a llama model"):
        prune(folder, KEPT, out=tmp_path / "cut")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_checkpoint_of_the_bare_base_model(tmp_path: Path) -> None:
    """Without the prefix of the model that holds it, as GPT-2 was published."""
    folder = saved(tmp_path / "dense", "gpt2")
    tensors = tensors_of(folder)
    save_file({n.removeprefix("transformer."): t for n, t in tensors.items()}, folder / "model.safetensors")
    prune(folder, KEPT, out=tmp_path / "cut")
    assert "h.2.attn.c_attn.weight" in load_file(tmp_path / "cut" / "model.safetensors")
    expected = prune(AutoModelForCausalLM.from_pretrained(folder), KEPT)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "cut"), tiny_tokens()), logits(expected, tiny_tokens())
    )


def test_what_else_lies_in_the_folder_comes_along(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "llama")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "README.md").write_text("---\nlicense: mit\ntags: chat\n---\nthe dense model's card")
    (folder / "pytorch_model.bin").write_bytes(b"dense")
    (folder / ".cache").mkdir()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    with pytest.warns(UserWarning, match=r"left out, as they hold weights of the dense model: pytorch_model\.bin"):
        prune(folder, KEPT, out=tmp_path / "cut")
    names = {path.relative_to(tmp_path / "cut").as_posix() for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "pruning.json"),
        *("tokenizer.model", "LICENSE", "additional_chat_templates/tool.jinja", "README.md"),
    }
    card = ModelCard.load(tmp_path / "cut" / "README.md")
    assert (card.data.license, card.data.tags) == ("mit", ["chat", "layer-pruning", "e3kernels"])
    assert f"Removed, counted from 0: {REMOVED}." in card.text
    assert "\ne3 prune --model dense --plan pruning.json --out cut\n" in card.text
    assert "the dense model's card" not in card.text
    assert str(tmp_path) not in card.content


def test_sub_layers_become_zeros_of_the_same_size(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "llama")
    plan = PruningPlan.of_removed(REMOVED, NUM_LAYERS, sublayers={"attention": [3], "mlp": [4]})
    with pytest.warns(UserWarning, match="the output projections of 2 sub-layers are set to 0"):
        prune(folder, plan, out=tmp_path / "cut")
    with pytest.warns(UserWarning, match="the output projections of 2 sub-layers are set to 0"):
        expected = prune(AutoModelForCausalLM.from_pretrained(folder), plan)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    digest = json.loads((tmp_path / "cut" / "pruning.json").read_text())["checkpoint"]["sha256"]
    content = stored(tmp_path / "cut")["model.layers.1.self_attn.o_proj.weight"]
    assert not any(content)
    assert digest["model.layers.1.self_attn.o_proj.weight"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"not tensors"), ValueError, "no whole safetensors file"),
        (lambda f: os.truncate(f / "model.safetensors", 4000), ValueError, "no whole safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "only safetensors are cut as files"),
        (
            lambda f: (
                (f / "model.safetensors").rename(f / "one.safetensors")
                and (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../one.safetensors"}}')
            ),
            ValueError,
            "its weight_map does not name files by tensor",
        ),
        (
            lambda f: (
                (f / "model.safetensors").rename(f / "one.safetensors")
                and (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "one.safetensors"}}')
            ),
            ValueError,
            "names x in one.safetensors, which has no such tensor",
        ),
    ],
)
def test_damaged_weights_are_refused_before_anything_is_written(damage, error, message, tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "llama")
    damage(folder)
    with pytest.raises(error, match=message):
        prune(folder, KEPT, out=tmp_path / "cut")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_folder_that_exists_is_never_written_over(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "llama")
    (tmp_path / "cut").mkdir()
    with pytest.raises(FileExistsError, match="cut exists and is never overwritten"):
        prune(folder, KEPT, out=tmp_path / "cut")
    with pytest.raises(ValueError, match="out= must name the folder"):
        prune(folder, KEPT)
    with pytest.raises(ValueError, match="goes with a folder or a file"):
        prune(tiny_model("llama"), KEPT, out=tmp_path / "other")


def test_a_killed_run_leaves_nothing_that_looks_like_a_result(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "llama")
    script = f"""
import os, signal
from e3pruner import prune
from e3pruner.surgery import checkpoint, shards
checkpoint.assert_parity = lambda *a, **b: os.kill(os.getpid(), signal.SIGKILL)
prune({str(folder)!r}, {KEPT}, out={str(tmp_path / "cut")!r})
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=120).returncode == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    left = [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    assert len(left) == 1
    prune(folder, KEPT, out=tmp_path / "cut")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "cut"}


def test_a_wrong_byte_is_found_by_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "dense", "llama")

    def one_zero(out, shards, **options):
        options["zeros"] = lambda name: name == "model.layers.1.mlp.up_proj.weight"
        return write_shards(out, shards, **options)

    monkeypatch.setattr(checkpoint, "write_shards", one_zero)
    with pytest.raises(ValueError, match="logits differ by"):
        prune(folder, KEPT, out=tmp_path / "cut")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_layer_is_in_memory_when_it_is_called_and_at_most_the_next_beside_it(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "qwen3_moe")
    filled, model = [], streamed_model(folder)
    layers = find_layers(model)
    assert not any(p.is_meta for n, p in model.named_parameters() if ".layers." not in n)

    def look(module, args):
        filled.append([i for i, layer in enumerate(layers) if not any(p.is_meta for p in layer.parameters())])

    for layer in layers:
        next(layer.children()).register_forward_pre_hook(look)
    streamed_logits = logits(model, tiny_tokens())
    assert len(filled) == NUM_LAYERS
    assert all(seen in ([i], [i, i + 1]) for i, seen in enumerate(filled))  # which another thread reads meanwhile
    assert all(p.is_meta for layer in layers[:-1] for p in layer.parameters())
    assert torch.equal(streamed_logits, logits(AutoModelForCausalLM.from_pretrained(folder), tiny_tokens()))


def test_memory_stays_small_whatever_the_size(tmp_path: Path) -> None:
    """A layer of 32 MB, fourteen of them: what is allocated beyond the imports is less than a tenth of the file."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=14,
        num_attention_heads=8,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="100MB")
    script = f"""
import threading, time, psutil
from e3pruner import prune
import transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) << 10
start, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
prune({str(tmp_path / "dense")!r}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 13], out={str(tmp_path / "cut")!r})
done = True; thread.join()
print(peak - start)
"""
    ran = subprocess.run([sys.executable, "-c", script], check=True, timeout=300, capture_output=True, text=True)
    size = sum(file.stat().st_size for file in (tmp_path / "dense").glob("*.safetensors"))
    assert size > 400 << 20
    assert int(ran.stdout) < 160 << 20, ran.stdout
