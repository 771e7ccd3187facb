"""Adapters of PEFT cut along with the model that they were trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import NUM_LAYERS, tiny_model, tiny_tokens
from typer.testing import CliRunner

from e3pruner import PruningPlan, prune
from e3pruner.cli import app
from e3pruner.models import skipped

peft = pytest.importorskip("peft")
KEPT, REMOVED = [1, 3, 4], [0, 2, 5]
PLAN = PruningPlan.of_removed(REMOVED, NUM_LAYERS)


def adapted(folder: Path, **options: Any) -> torch.nn.Module:
    """A dense model with an adapter on it, whose matrices are random, saved in `folder`."""
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**{"r": 4} | options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1, 4]},
        {"target_modules": ["q_proj"], "layers_to_transform": [3, 4], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": 3},
        {"target_modules": ["model.layers.3.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.4.mlp.up_proj"]},
        {"target_modules": r".*layers\.(0|3|5)\.self_attn\.[qv]_proj"},
        {"target_modules": r"model\.layers\.[1-4]\..*gate_proj"},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.3.self_attn.q_proj": 7, "v_proj": 2}},
        {"target_modules": ["q_proj"], "alpha_pattern": {r"^model\.layers\.(1|2)\.self_attn\.q_proj": 32}},
    ],
)
@torch.no_grad()
def test_the_cut_adapter_does_on_the_cut_model_what_it_did(options: dict[str, Any], tmp_path: Path) -> None:
    dense, ids = adapted(tmp_path / "adapter", **options), tiny_tokens()
    assert prune(tmp_path / "adapter", PLAN, out=tmp_path / "cut") == tmp_path / "cut"
    pruned = prune(tiny_model("llama"), KEPT)
    assert not torch.equal(pruned(ids, use_cache=False).logits, dense(input_ids=ids, use_cache=False).logits)
    found = peft.PeftModel.from_pretrained(pruned, tmp_path / "cut").eval()
    names = {name for name, _ in found.named_parameters() if "lora_" in name}
    stored = {
        name.replace(".weight", ".default.weight") for name in load_file(tmp_path / "cut/adapter_model.safetensors")
    }
    assert {name for name in names if ".weight" in name and "magnitude" not in name} == {
        name for name in stored if "magnitude" not in name
    }
    whole = dense.merge_and_unload()
    with skipped(whole, REMOVED):
        expected = whole(ids, use_cache=False).logits
    torch.testing.assert_close(found.merge_and_unload()(ids, use_cache=False).logits, expected, rtol=0, atol=1e-5)


def test_tensors_keep_their_bytes_and_no_base_model_is_named(tmp_path: Path) -> None:
    adapted(tmp_path / "adapter", target_modules=["q_proj"])
    (tmp_path / "adapter" / "training_args.bin").write_bytes(b"pickle")
    with pytest.warns(UserWarning, match=r"left out, .*training_args\.bin"):
        prune(tmp_path / "adapter", PLAN, out=tmp_path / "cut")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "cut"))
    assert len(after) == len(before) // 2
    for new, old in enumerate(KEPT):
        name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
        assert torch.equal(after[name.format(new)], before[name.format(old)])
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert len(json.loads((tmp_path / "cut" / "pruning.json").read_text())["checkpoint"]["sha256"]) == len(after)


def test_the_command_cuts_the_adapter_along(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    adapted(tmp_path / "lora", target_modules=["q_proj"])
    PLAN.save(tmp_path / "plan.json")
    out = tmp_path / "cut"
    arguments = ["--model", tmp_path / "dense", "--plan", tmp_path / "plan.json", "--out", out]
    result = CliRunner().invoke(app, ["prune", *map(str, arguments), "--adapter", str(tmp_path / "lora")])
    assert result.exit_code == 0, result.output
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(out)
    assert peft.AutoPeftModelForCausalLM.from_pretrained(out / "adapter").config.num_hidden_layers == 3
    wrong = CliRunner().invoke(app, ["prune", *map(str, arguments), "--force", "--adapter", str(tmp_path / "dense")])
    assert wrong.exit_code == 2
    assert "holds no adapter_config.json" in wrong.output


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    adapted(tmp_path / "adapter", target_modules=["q_proj"], layers_to_transform=[0, 5])
    with pytest.raises(ValueError, match=r"adapts the layers \[0, 5\], of which plan keeps none"):
        prune(tmp_path / "adapter", PLAN, out=tmp_path / "cut")
    with pytest.raises(ValueError, match=r"adapts layer 5; plan is for 4 layers"):
        prune(tmp_path / "adapter", PruningPlan.of_removed([0], 4), out=tmp_path / "cut")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "PREFIX_TUNING", "num_layers": 6}))
    with pytest.raises(ValueError, match=r"PREFIX_TUNING\): num_layers=6 ties it to all layers"):
        prune(tmp_path / "adapter", PLAN, out=tmp_path / "cut")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_of_a_tensor_with_a_part_of_every_layer_is_refused(tmp_path: Path) -> None:
    model = tiny_model("gemma4_text", hidden_size_per_layer_input=8)
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "per_layer_model_projection"])
    peft.get_peft_model(model, options).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapts .*per_layer_model_projection.*, which has a part of every layer"):
        prune(tmp_path / "adapter", PLAN, out=tmp_path / "cut")
