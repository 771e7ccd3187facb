"""Quantised checkpoints cut as files: bytes, names and rules of every format; logits of those that run on a CPU."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from quantised_layouts import LAYOUTS, LEFT, rewritten
from safetensors import safe_open
from tiny_models import NUM_LAYERS, TINY_CONFIGS, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import e3pruner
from e3pruner import PruningPlan, prune
from e3pruner.models import skipped
from e3pruner.models.loading import load_model
from e3pruner.recovery import compensate, distill

KEPT, REMOVED = [1, 3, 4], [0, 2, 5]
CUT = "model.layers.1.mlp.down_proj"  # what LEFT is called afterwards


def contents(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor in a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = entry["dtype"], entry["shape"], raw[start + begin : start + end]
    return found


def moved(before: dict) -> dict:
    """What is left of the tensors of a dense checkpoint, by their new names."""
    after = {}
    for name, content in before.items():
        if not name.startswith("model.layers."):
            after[name] = content
        elif (layer := int(name.split(".")[2])) in KEPT:
            after[name.replace(f"model.layers.{layer}.", f"model.layers.{KEPT.index(layer)}.")] = content
    return after


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def proof_of(folder: Path) -> str:
    return json.loads((folder / "pruning.json").read_text())["checkpoint"]["proof"]


@pytest.mark.parametrize("form", LAYOUTS)
def test_a_format_keeps_its_bytes_and_its_rules(form: str, tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    folder = rewritten(tmp_path / "dense", *LAYOUTS[form], skip={LEFT})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prune(folder, PruningPlan.of_removed(REMOVED, NUM_LAYERS), out=tmp_path / "cut")
    cut = contents(tmp_path / "cut")
    assert cut == moved(contents(folder))
    assert f"{CUT}.weight" in cut
    if proof_of(tmp_path / "cut") == "bytes":
        assert any("cannot be run here" in str(each.message) for each in said)

    rules, before = settings_of(tmp_path / "cut"), settings_of(folder)
    if form == "gptq":
        assert list(rules["dynamic"].values()) == list(before["dynamic"].values())
        left, four_bits = (re.compile(rule[2:]) for rule in rules["dynamic"])  # of two that match the first counts
        modules = {name.rpartition(".")[0] for name in cut if name.startswith("model.layers.")}
        assert {name for name in modules if left.match(name)} == {CUT}
        assert {name for name in modules if four_bits.match(name)} == {
            name for name in modules if name.startswith("model.layers.0.")
        }
    elif form == "compressed-tensors":
        assert rules["ignore"] == ["lm_head", r"re:.*layers\.1\.mlp\.down_proj"]
        assert rules["config_groups"] == before["config_groups"]
    else:
        assert rules["modules_to_not_convert"] == ["lm_head", CUT]


def test_experts_in_four_bits(tmp_path: Path) -> None:
    """The layout of gpt_oss: blocks and scales of all experts in one tensor each, rules with a * for the layer."""
    model = tiny_model("gpt_oss")
    model.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, rows, columns = tensors.pop(name).transpose(1, 2).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 255, (experts, columns, rows // 16, 8), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(0, 255, (experts, columns, rows // 16), dtype=torch.uint8)
    from safetensors.torch import save_file

    save_file(tensors, file)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    rules = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": rules}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prune(tmp_path / "dense", KEPT, out=tmp_path / "cut")
    assert contents(tmp_path / "cut") == moved(contents(tmp_path / "dense"))
    assert settings_of(tmp_path / "cut") == config["quantization_config"]


def test_files_of_a_quantiser_beside_the_configuration(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    content = {"producer": {"name": "modelopt"}, "quantization": {"exclude_modules": ["lm_head", "model.layers.3*"]}}
    (tmp_path / "dense" / "hf_quant_config.json").write_text(json.dumps(content))
    prune(tmp_path / "dense", KEPT, out=tmp_path / "cut")
    found = json.loads((tmp_path / "cut" / "hf_quant_config.json").read_text())
    assert found["quantization"]["exclude_modules"] == ["lm_head", "model.layers.1*"]


def test_a_float8_checkpoint_is_proven_by_its_dequantised_logits(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    folder = rewritten(tmp_path / "dense", *LAYOUTS["fp8"], skip={LEFT})
    prune(folder, KEPT, out=tmp_path / "cut")
    assert proof_of(tmp_path / "cut") == "logits"


def quantised(form: str, folder: Path) -> Path:
    """A checkpoint that transformers quantised and saved; layer 3's down projection is not."""
    if form == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
        tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
        return rewritten(folder, *LAYOUTS[form], skip={LEFT})
    skip = ["lm_head", LEFT]
    if form == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        options = TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=skip)
    else:
        pytest.importorskip("bitsandbytes")
        bits = {"load_in_8bit": True} if form.endswith("8") else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        options = BitsAndBytesConfig(**bits, bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skip)
    plain = folder.with_name("plain")
    wide = TINY_CONFIGS["llama"] | {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}
    tiny_model("llama", **wide).to(torch.bfloat16).save_pretrained(plain)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=options, device_map="cpu").save_pretrained(folder)
    return folder


FORMS = ["bitsandbytes 4", "bitsandbytes 8", "torchao", "compressed-tensors"]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_what_runs_here_is_proven_by_its_logits(form: str, tmp_path: Path) -> None:
    folder = quantised(form, tmp_path / "dense")
    prune(folder, PruningPlan.of_removed(REMOVED, NUM_LAYERS), out=tmp_path / "cut")
    assert proof_of(tmp_path / "cut") == "logits"
    assert contents(tmp_path / "cut") == moved(contents(folder))
    dense, cut = load_model(str(folder), "cpu"), load_model(str(tmp_path / "cut"), "cpu")
    ids = tiny_tokens()
    with skipped(dense, REMOVED):
        expected = dense(ids, use_cache=False).logits
    assert torch.equal(cut(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_streamed_model_computes_the_same_however_often(form: str, tmp_path: Path) -> None:
    """bitsandbytes unpacks what runs when it is asked for names: nothing is read ahead meanwhile. Its weights come
    dequantised, and what they are multiplied by is not rounded."""
    folder, ids = quantised(form, tmp_path / "dense"), tiny_tokens()
    expected = load_model(str(folder), "cpu")(ids, use_cache=False).logits
    model = load_model(str(folder), "cpu", placement="stream")
    found = [model(ids, use_cache=False).logits for _ in range(8)]
    assert all(torch.equal(each, found[0]) for each in found)
    error = 0.1 if form.startswith("bitsandbytes") else 0.0
    assert (found[0] - expected).abs().max() <= error * expected.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_search_and_evaluation_of_a_quantised_model(form: str, tmp_path: Path) -> None:
    folder = quantised(form, tmp_path / "dense")
    model, ids = load_model(str(folder), "cpu"), tiny_tokens(4, 16)
    plan = e3pruner.search(model, ids, drop=2, method="greedy")
    prune(folder, plan, out=tmp_path / "cut")
    cut = load_model(str(tmp_path / "cut"), "cpu")
    with torch.no_grad():
        teacher, student = (each(ids).logits[:, :-1].double().log_softmax(-1) for each in (model, cut))
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean().item()
    assert e3pruner.evaluate(cut, ids, teacher=model)["kl"] == pytest.approx(expected, rel=0.02)
    assert plan.metrics["kl"] == pytest.approx(expected, rel=0.1)
    for method in ("taylor", "straight-through"):
        with pytest.raises(ValueError, match="is quantised, which forward passes, search and evaluate take; "):
            e3pruner.search(model, ids, drop=2, method=method)


def test_what_needs_other_weights_says_so_before_it_begins() -> None:
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    other, ids = tiny_model("llama"), tiny_tokens()
    with pytest.raises(ValueError, match=r"model \(LlamaForCausalLM\) is quantised.*it is cut as files"):
        prune(model, KEPT)
    with pytest.raises(ValueError, match=r"pruned \(LlamaForCausalLM\) is quantised.*load it dequantised"):
        distill(pruned=model, teacher=other, data=ids)
    with pytest.raises(ValueError, match=r"teacher \(LlamaForCausalLM\) is quantised.*load it dequantised"):
        compensate(pruned=prune(other, KEPT), teacher=model, plan=KEPT, data=ids, method="scale")


def test_sub_layers_of_quantised_weights_are_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    folder = rewritten(tmp_path / "dense", *LAYOUTS["gptq"], skip={LEFT})
    plan = PruningPlan.of_removed(REMOVED, NUM_LAYERS, sublayers={"attention": [3], "mlp": []})
    with pytest.raises(ValueError, match=r"sublayers=.* weights that are quantised are not set to 0"):
        prune(folder, plan, out=tmp_path / "cut")
