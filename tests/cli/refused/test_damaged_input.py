"""Damaged files on the command line: one sentence, exit code 2, nothing left behind; and tokenizers of old kinds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli.conftest import Command
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from e3pruner import PruningPlan

DEEP = "[" * 100_000


def copy_of(model: Path, folder: Path, **changes: Any) -> Path:
    """The model with another config.json: `changes` of its values, or of all of it as text."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if text := changes.pop("text", None):
        (folder / "config.json").write_text(text)
    else:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))
    return folder


def assert_refused(result: Any, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "{"}, "config.json is damaged"),
        ({"text": "null"}, "config.json must hold a JSON object"),
        ({"text": "[1]"}, "config.json must hold a JSON object"),
        ({"text": DEEP}, "nested too deeply"),
        ({"model_type": []}, "config.json describes no model"),
        ({"model_type": None}, "config.json describes no model"),
        ({"num_attention_heads": 0}, "config.json describes no model"),
        ({"num_hidden_layers": None}, "config.json describes no model"),
        ({"hidden_act": "magic"}, "cannot be loaded"),
        ({"head_dim": 0}, "cannot be loaded"),
        ({"vocab_size": 0}, "cannot be loaded"),
        ({"hidden_size": 0}, "tensors do not fit config.json"),
        ({"vocab_size": 300}, "model.embed_tokens.weight"),
        ({"num_hidden_layers": 8}, "tensors that its config.json asks for are not in its weights"),
        ({"num_hidden_layers": 0}, "layer"),
    ],
)
def test_a_damaged_config(
    changes: dict[str, Any], message: str, model_folder: Path, tmp_path: Path, e3: Command
) -> None:
    model = copy_of(model_folder, tmp_path / "model", **changes)
    PruningPlan.of_removed([3], 6).save(tmp_path / "pruning.json")
    out = ("--out", tmp_path / "out")
    assert_refused(e3("prune", "--model", model, "--plan", tmp_path / "pruning.json", *out), message)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "pruning.json"}


@pytest.mark.parametrize("content", ["{", "null", "[]", DEEP, '{"model": 3}', '{"version": "1.0", "model": null}'])
def test_a_damaged_tokenizer(content: str, model_folder: Path, tmp_path: Path, e3: Command) -> None:
    model = copy_of(model_folder, tmp_path / "model")
    (model / "tokenizer.json").write_text(content)
    assert_refused(e3("generate", "--model", model, "--prompt", "a"), "tokenizer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "nested too deeply"),
        ("drop: [1, 2]", "drop is [1, 2]; it must be one value"),
        ("drop: {a: 1}", "drop is a mapping; it must be one value"),
        ("drop: 8.7", "Invalid value for '--drop'"),
        ("drop: yes", "Invalid value for '--drop'"),
        ("protect: [[1]]", "protect is [[1]]; it must be a list of values"),
        ("protect: [null]", "protect is [None]; it must be a list of values"),
        ("search: 3", "must be NAME=VALUE"),
        ("fraction: .nan", "Invalid value for '--fraction'"),
        ("length: 0", "length"),
        ("sequences: null\ndorp: 3", "did you mean 'drop'"),
        ("3: 4", "unknown keys: 3"),
        ("\x00", "cannot be read as YAML"),
        ("a: &a [*a]\ndrop: *a", "unknown keys: a"),
        ("null", "must hold one mapping"),
    ],
)
def test_a_damaged_configuration_file(
    text: str, message: str, model_folder: Path, text_file: Path, tmp_path: Path, e3: Command
) -> None:
    config = tmp_path / "options.yaml"
    config.write_text(text)
    command = ("search", "--model", model_folder, "--text", text_file, "--config", config, "--out", tmp_path / "out")
    assert_refused(e3(*command), message)
    assert [path.name for path in tmp_path.iterdir()] == ["options.yaml"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("methods: 3", "methods=3 is no list"),
        ("methods: [3]", "methods: 3 must be a name or a mapping"),
        ("methods: [null]", "methods: None must be"),
        ("methods: [{name: a}]", "names no method"),
        ("methods: [{method: greedy, serch: {}}]", "did you mean 'search'"),
        ("methods: [{method: greedy, search: [1]}]", "search=[1] must be a mapping"),
        ("drop: 3", "drop=3 is no list of integer"),
        ("drop: [1.5]", "is no list of integer"),
        ("drop: [yes]", "is no list of integer"),
        ("recoveries: {a: 1}", "recoveries={'a': 1} is no list"),
        ("recoveries: [{recover: 3}]", "recover=3 must be a mapping"),
        ("recoveries: [{compensate: maybe}]", "must be true or false"),
        ("seeds: [a]", "is no list of integer"),
        ("length: 1", "length=1 must be an integer from 2"),
        ("held_out: .nan", "held_out=nan is no integer"),
        ("text: null\ntitle: [a]", "title=['a'] is no text"),
        (f"x: {DEEP}", "nested too deeply"),
    ],
)
def test_a_damaged_matrix(change: str, message: str, tmp_path: Path, e3: Command) -> None:
    whole = {"methods": "methods: [greedy]", "drop": "drop: [2]", "seeds": "seeds: [0]"}
    whole[change.partition(":")[0]] = change
    (tmp_path / "matrix.yaml").write_text("\n".join(whole.values()))
    assert_refused(e3("compare", tmp_path / "matrix.yaml", "--out", tmp_path / "out"), message)
    assert [path.name for path in tmp_path.iterdir()] == ["matrix.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "--fraction", "nan"), "--fraction nan must be a finite number"),
        (("search", "--latency", "inf"), "--latency inf must be a finite number"),
        (("search", "--fraction", "2"), "fraction=2.0 must be between 0 and 1"),
        (("search", "--method", "gumbel-top"), "did you mean 'gumbel-topk'"),
        (("search", "--search", "stepz=3"), "did you mean 'steps'"),
        (("search", "--search", "steps=x"), "steps='x' is no integer"),
        (("search", "--drop", "2", "--search", "steps=0"), "steps=0"),
        (("search", "--granularity", "layers"), "did you mean 'layer'"),
        (
            ("search", "--quota", "attention"),
            "quota='attention' names no engine; known are llama.cpp, SGLang, vLLM",
        ),
        (("search", "--quota", "attention", "--quota", "mlp=1"), "--quota must be NAME=VALUE"),
        (("search", "--device", "cuda:99"), "device='cuda:99' cannot be used here"),
        (("distill", "--teacher", "smollm2", "--recover", "lr=.nan"), "lr=nan must be finite"),
        (("distill", "--teacher", "smollm2", "--recover", "weighting=entropi"), "weighting='entropi' must be one of"),
        (("distill", "--teacher", "smollm2", "--recover", "steps=2.5"), "steps=2.5 is no integer"),
        (("distill", "--teacher", "smollm2", "--lr", "inf"), "--lr inf must be a finite number"),
        (("eval", "--device", "abacus"), "device='abacus' cannot be used here"),
    ],
)
def test_a_bad_value_is_named_and_leaves_nothing(
    arguments: tuple[str, ...], message: str, model_folder: Path, text_file: Path, tmp_path: Path, e3: Command
) -> None:
    command, *options = arguments
    place = ("--model", model_folder, "--text", text_file, "--length", 32, "--out", tmp_path / "out")
    assert_refused(e3(command, *options, *place), message)
    assert list(tmp_path.iterdir()) == []


def test_numbers_may_have_exponents_without_a_point(tmp_path: Path, e3: Command) -> None:
    result = e3("distill", "--model", tmp_path, "--teacher", tmp_path, "--recover", "lr=2e-4", "--out", tmp_path / "a")
    assert_refused(result, "neither a folder with a config.json")


@pytest.fixture
def old_tokenizer(tmp_path: Path) -> Path:
    """A GPT-2 whose tokenizer is vocab.json and merges.txt alone."""
    folder = tmp_path / "gpt2"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(["<|endoftext|>", *alphabet])}
    tiny_model("gpt2", vocab_size=len(vocabulary)).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def test_tokenizers_of_the_old_kind_come_along(
    old_tokenizer: Path, text_file: Path, tmp_path: Path, e3: Command
) -> None:
    PruningPlan.of_removed([3], 6).save(tmp_path / "pruning.json")
    result = e3("prune", "--model", old_tokenizer, "--plan", tmp_path / "pruning.json", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (old_tokenizer / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"]
    arguments = ("--text", text_file, "--length", 32, "--held-out", 2, "--no-speed")
    assert e3("eval", "--model", tmp_path / "out", *arguments).exit_code == 0


def test_a_model_without_a_tokenizer_is_pruned_and_it_is_said(model_folder: Path, tmp_path: Path, e3: Command) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        (bare / file).write_bytes((model_folder / file).read_bytes())
    PruningPlan.of_removed([3], 6).save(tmp_path / "pruning.json")
    result = e3("prune", "--model", bare, "--plan", tmp_path / "pruning.json", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "has no tokenizer beside it" in result.stderr


@pytest.fixture
def own_code(model_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint that brings its own code, and says so when it runs."""
    folder = copy_of(model_folder, tmp_path / "own", model_type="odd", architectures=["OddForCausalLM"])
    auto = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"auto_map": auto}))
    (folder / "modeling_odd.py").write_text(
        "import sys\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "print('its own code runs', file=sys.stderr)\n"
        "class OddConfig(LlamaConfig):\n    model_type = 'odd'\n"
        "class OddForCausalLM(LlamaForCausalLM):\n    config_class = OddConfig\n"
    )
    return folder


def test_code_of_a_checkpoint_runs_only_when_it_is_trusted(own_code: Path, text_file: Path, tmp_path: Path) -> None:
    plan = tmp_path / "pruning.json"
    PruningPlan.of_removed([3], 6).save(plan)
    program = "from e3pruner.cli import app; app()"
    command = [sys.executable, "-c", program, "prune", "--model", own_code, "--plan", plan, "--out", tmp_path / "out"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*map(str, command), *more], env=environment, capture_output=True, text=True, check=False)

    refused = run()
    assert refused.returncode == 2
    assert "--trust-remote-code" in refused.stderr
    assert "its own code runs" not in refused.stderr
    assert not (tmp_path / "out").exists()
    trusted = run("--trust-remote-code")
    assert trusted.returncode == 0, trusted.stderr
    assert "its own code runs" in trusted.stderr
    assert (tmp_path / "out" / "modeling_odd.py").exists()
    whole, cut = (load_file(folder / "model.safetensors") for folder in (own_code, tmp_path / "out"))
    assert torch.equal(whole["model.layers.5.mlp.up_proj.weight"], cut["model.layers.4.mlp.up_proj.weight"])


def test_weights_that_lack_a_tensor(model_folder: Path, tmp_path: Path, e3: Command) -> None:
    model = copy_of(model_folder, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert_refused(e3("generate", "--model", model, "--prompt", "a"), "model.layers.2.mlp.up_proj.weight")


def test_keys_of_a_file_are_the_options_of_the_command_line(tmp_path: Path, e3: Command) -> None:
    config = tmp_path / "ops.yaml"
    settings = {"op": ["entropy_kl"], "provider": ["reference"], "rows": 4, "vocabulary": 40, "dtype": ["float32"]}
    config.write_text(yaml.safe_dump(settings))
    result = e3("profile", "ops", "--config", config, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert yaml.safe_load((tmp_path / "out" / "e3.yaml").read_text())["dtype"] == ["float32"]
