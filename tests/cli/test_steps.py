"""search, prune, distill, eval, generate and report on a tiny real model, each on what the one before left."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cli.conftest import Command, byte_tokenizer
from recovery.test_tracking import curves
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from e3pruner import PruningPlan, prune

SMALL = ("--length", 32, "--sequences", 4)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steps")


@pytest.fixture(scope="module")
def searched(results: Path, model_folder: Path, text_file: Path, e3: Command) -> Path:
    out = results / "searched"
    arguments = ("--drop", 2, "--text", text_file, *SMALL, "--option", "steps=5", "--out", out)
    assert_done(e3("search", "--model", model_folder, *arguments))
    return out


@pytest.fixture(scope="module")
def pruned(results: Path, model_folder: Path, searched: Path, e3: Command) -> Path:
    out = results / "pruned"
    assert_done(e3("prune", "--model", model_folder, "--plan", searched / "pruning.json", "--out", out))
    return out


@pytest.fixture(scope="module")
def recovered(results: Path, model_folder: Path, pruned: Path, text_file: Path, e3: Command) -> Path:
    out = results / "recovered"
    arguments = ("--steps", 12, "--length", 32, "--held-out", 4, "--text", text_file, "--option", "eval_every=4")
    arguments = (*arguments, "--lr", 3e-4, "--track", "tensorboard")
    assert_done(e3("distill", "--model", pruned, "--teacher", model_folder, *arguments, "--out", out))
    return out


def assert_done(result: object) -> None:
    assert result.exit_code == 0, result.output


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_search_leaves_a_plan_and_its_options(searched: Path) -> None:
    assert names(searched) == {"pruning.json", "results.json", "e3.yaml"}
    plan = PruningPlan.load(searched / "pruning.json")
    assert len(plan.removed) == 2
    assert plan.method == "gumbel-topk"
    options = yaml.safe_load((searched / "e3.yaml").read_text())
    assert options["drop"] == 2
    assert options["search"] == {"steps": 5}
    assert options["batch"] == 4


def test_search_by_what_remains_after_a_recovery(
    model_folder: Path, text_file: Path, tmp_path: Path, e3: Command
) -> None:
    given = ("--model", model_folder, "--drop", 2, "--text", text_file, *SMALL, "--objective", "healed")
    out = tmp_path / "out"
    result = e3("search", *given, "--rungs", "3x64,2x128", "--recover", "lr=1e-3", "--option", "steps=2", "--out", out)
    assert_done(result)
    plan = PruningPlan.load(out / "pruning.json")
    assert [len(record["masks"]) for record in plan.history if "masks" in record] == [3, 2]
    assert f"{plan.metrics['healed_kl']:.3f} after a recovery" in result.output
    assert yaml.safe_load((out / "e3.yaml").read_text())["recover"] == {"lr": 1e-3}
    refused = e3("search", *given[:-2], "--recover", "lr=1e-3", "--out", tmp_path / "other")
    assert (refused.exit_code, "--recover is of --objective healed" in refused.output) == (2, True)


def test_the_command_writes_every_plan_the_choice_and_a_plot(
    model_folder: Path, text_file: Path, tmp_path: Path, e3: Command
) -> None:
    given = ("search", "--model", model_folder, "--text", text_file, "--length", 32, "--sequences", 4, "--no-speed")
    out = tmp_path / "out"
    result = e3(*given, "--drop", "1,3", "--held-out", 2, "--max-perplexity-ratio", 1e9, "--out", out)
    assert result.exit_code == 0, result.output
    assert PruningPlan.load(out / "pruning.json") == PruningPlan.load(out / "plans" / "drop-3.json")
    assert "3 removed" in result.output
    assert {"frontier.png", "report.html"} <= {path.name for path in out.iterdir()}
    for wrong in (("--drop", "1,3", "--fraction", 0.5), ("--frontier", "--drop", 2), ("--max-perplexity-ratio", 2)):
        refused = e3(*given, *wrong, "--out", tmp_path / "other")
        assert (refused.exit_code, (tmp_path / "other").exists()) == (2, False)


def test_the_saved_options_give_the_same_plan(searched: Path, tmp_path: Path, e3: Command) -> None:
    assert_done(e3("search", "--config", searched / "e3.yaml", "--out", tmp_path / "again"))
    assert (tmp_path / "again" / "pruning.json").read_bytes() == (searched / "pruning.json").read_bytes()


@pytest.mark.parametrize(
    ("target", "removed", "parts"),
    [
        (("--fraction", 0.5), 3, 0),
        (("--granularity", "sublayer", "--quota", "attention=2", "--quota", "mlp=0"), 0, 2),
        (("--granularity", "sublayer", "--drop", 1), 0, 1),
    ],
)
def test_other_targets(
    target: tuple, removed: int, parts: int, model_folder: Path, text_file: Path, tmp_path: Path, e3: Command
) -> None:
    arguments = ("--model", model_folder, "--text", text_file, *SMALL, "--method", "greedy", "--out", tmp_path / "out")
    assert_done(e3("search", *arguments, *target))
    plan = PruningPlan.load(tmp_path / "out" / "pruning.json")
    assert (len(plan.removed), sum(map(len, plan.sublayers.values()))) == (removed, parts)


def test_two_targets_are_refused(model_folder: Path, text_file: Path, tmp_path: Path, e3: Command) -> None:
    arguments = ("--model", model_folder, "--text", text_file, *SMALL, "--out", tmp_path / "out")
    result = e3("search", *arguments, "--drop", 2, "--fraction", 0.5)
    assert result.exit_code == 2
    assert "drop=2 is one target" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_export_loads_without_this_package(pruned: Path, model_folder: Path, searched: Path, tmp_path: Path) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json", "pruning.json", "e3.yaml"} <= names(pruned)
    tokens = torch.arange(24).view(2, 12) * 5
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    program = """
import sys
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, work = sys.argv[1:]
AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokens = load_file(f"{work}/tokens.safetensors")["tokens"]
save_file({"logits": model(tokens).logits.detach()}, f"{work}/logits.safetensors")
assert not [name for name in sys.modules if name.startswith(("e3pruner", "e3kernels"))]
"""
    subprocess.run([sys.executable, "-c", program, pruned, tmp_path], check=True, cwd=tmp_path, env={"PATH": ""})
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    kept = PruningPlan.load(searched / "pruning.json").kept
    import e3pruner

    expected = e3pruner.prune(model, kept)(tokens).logits
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], expected, rtol=0, atol=0)


def test_distill_lowers_the_divergence(recovered: Path) -> None:
    assert {"config.json", "model.safetensors", "results.json", "e3.yaml"} <= names(recovered)
    assert "training" not in names(recovered)
    curve = json.loads((recovered / "results.json").read_text())["recovery"]
    assert [step for step, _ in curve["held_out"]] == [0, 4, 8, 12]
    assert len(curve["train"]) == 12
    assert curve["held_out"][-1][1] < curve["held_out"][0][1]
    tracked = curves(recovered / "tensorboard")["held_out/kl"]
    assert tracked == [(step, pytest.approx(kl, rel=1e-6)) for step, kl in curve["held_out"]]


@pytest.fixture(scope="module")
def cached(results: Path, model_folder: Path, text_file: Path, e3: Command) -> Path:
    out = results / "cached"
    made = e3("cache-teacher", "--teacher", model_folder, "--text", text_file, "--length", 32, "--k", 5, "--out", out)
    assert_done(made)
    assert "19.4 bytes each: 148,180 bytes of " in made.stderr
    return out


@pytest.mark.parametrize(("asked", "given"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_distill_gives_back_the_dtype_that_came_in(
    asked: str | None,
    given: torch.dtype,
    pruned: Path,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    e3: Command,
) -> None:
    AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.bfloat16).save_pretrained(tmp_path / "narrow")
    arguments = ["--model", tmp_path / "narrow", "--teacher", model_folder, "--text", text_file, "--length", 32]
    arguments += ["--steps", 2, "--held-out", 2, "--lr", 3e-4, *(("--dtype", asked) if asked else ())]
    assert_done(e3("distill", *arguments, "--out", tmp_path / "out"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("narrow", "out"))
    assert {tensor.dtype for tensor in after.values()} == {given}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == given
    assert any(not torch.equal(before[name], after[name].bfloat16()) for name in before)


def test_distill_learns_from_a_cache(cached: Path, pruned: Path, text_file: Path, tmp_path: Path, e3: Command) -> None:
    text = ("--text", text_file, "--held-out", 4)
    arguments = ("--model", pruned, "--teacher-cache", cached, "--steps", 12, "--lr", 3e-4, *text)
    result = e3("distill", *arguments, "--length", 32, "--out", tmp_path / "out")
    assert_done(result)
    curve = json.loads((tmp_path / "out" / "results.json").read_text())["recovery"]
    assert curve["perplexity"][-1][1] < curve["perplexity"][0][1]
    assert curve["held_out"] == []
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4
    other = e3("distill", *arguments, "--length", 16, "--out", tmp_path / "other")
    assert other.exit_code == 2
    assert "is not what" in other.stderr


def test_a_cache_is_verified(cached: Path, tmp_path: Path, e3: Command) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(cached, copy)
    assert_done(e3("cache-teacher", "--verify", "--out", copy))
    shard = copy / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    damaged = e3("cache-teacher", "--verify", "--out", copy)
    assert damaged.exit_code == 2
    assert "shard-00000.safetensors is damaged" in damaged.stderr


@pytest.mark.parametrize("teachers", [(), ("--teacher", "a", "--teacher-cache", "b")])
def test_distill_takes_one_teacher(teachers: tuple, pruned: Path, tmp_path: Path, e3: Command) -> None:
    result = e3("distill", "--model", pruned, *teachers, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "give one of them" in result.stderr


def test_eval_lets_models_write(text_file: Path, tmp_path: Path, e3: Command) -> None:
    model, tokenizer = tmp_path / "model", byte_tokenizer()
    network = tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=0, max_position_embeddings=512)
    for part in (network, tokenizer):
        part.save_pretrained(model)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once\n\nTwice, and then\n", encoding="utf-8")
    arguments = ("--model", model, "--text", text_file, "--length", 32, "--held-out", 2)
    arguments = (*arguments, "--no-speed", "--max-new-tokens", 12)
    result = e3("eval", *arguments, "--generate", "--prompts", prompts, "--out", tmp_path / "out")
    assert_done(result)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["writing"]
    assert found.keys() == {str(model)}
    assert found[str(model)]["greedy"].keys() == {"loops", "distinct_bigrams", "tokens", "ends"}
    assert "greedy loops" in result.output
    assert "all pass@4" in result.output


def test_prompts_without_generate_are_refused(model_folder: Path, tmp_path: Path, e3: Command) -> None:
    result = e3("eval", "--model", model_folder, "--prompts", tmp_path / "prompts.txt")
    assert result.exit_code == 2
    assert "--generate" in result.output


def test_eval_compares_with_the_teacher(
    recovered: Path, model_folder: Path, text_file: Path, tmp_path: Path, e3: Command
) -> None:
    arguments = ("--length", 32, "--held-out", 4, "--text", text_file, "--no-speed", "--out", tmp_path / "figures")
    result = e3("eval", "--model", recovered, "--teacher", model_folder, *arguments)
    assert_done(result)
    dense, model = json.loads((tmp_path / "figures" / "results.json").read_text())["models"]
    assert (dense["layers"], model["layers"]) == (6, 4)
    assert dense["kl"] == pytest.approx(0, abs=1e-6)
    assert dense["top1_agreement"] == 1
    assert model["kl"] > 0
    assert f"{model['perplexity']:.2f}" in result.stdout


def test_generate_writes_the_text_and_nothing_else_to_stdout(recovered: Path, e3: Command) -> None:
    result = e3("generate", "--model", recovered, "--prompt", "def", "--max-new-tokens", 5)
    assert_done(result)
    assert "tokens/s" in result.stderr
    assert "tokens/s" not in result.stdout
    sampled = [
        e3("generate", "--model", recovered, "--prompt", "a", "--temperature", 1, "--seed", s).stdout for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_runs_the_kept_layers_and_lets_them_draft(model_folder: Path, e3: Command) -> None:
    pytest.importorskip("e3kernels._runtime", reason="e3kernels._runtime is not built")
    arguments = ("generate", "--model", model_folder, "--prompt", "def", "--max-new-tokens", 12)
    dense, kept = e3(*arguments), e3(*arguments, "--keep", "0-2,5")
    drafted = e3(*arguments, "--keep", "0-2,5", "--speculative")
    for result in (dense, kept, drafted):
        assert_done(result)
    assert drafted.stdout == dense.stdout != kept.stdout
    assert "drafted tokens accepted" in drafted.stderr


def test_generate_says_why_hugging_face_decodes(tmp_path: Path, e3: Command) -> None:
    pytest.importorskip("e3kernels._runtime", reason="e3kernels._runtime is not built")
    tokenizer = byte_tokenizer()
    model = tiny_model("gpt2", vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=0)
    for folder, network in (("dense", model), ("cut", prune(model, [0, 1, 2, 5]))):
        network.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    arguments = ("--prompt", "def", "--max-new-tokens", 12)
    kept = e3("generate", "--model", tmp_path / "dense", *arguments, "--keep", "0-2,5")
    cut = e3("generate", "--model", tmp_path / "cut", *arguments)
    for result in (kept, cut):
        assert_done(result)
    said = " ".join(kept.stderr.split())
    assert "Hugging Face decodes this model, LayerSkipRuntime does not: model is a GPT2LMHeadModel" in said
    assert "Hugging Face" not in cut.stderr
    assert kept.stdout == cut.stdout
    drafted = e3("generate", "--model", tmp_path / "dense", *arguments, "--keep", "0-2,5", "--speculative")
    assert drafted.exit_code == 2
    assert "GPT2LMHeadModel" in drafted.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--speculative",), "needs the layers that draft"),
        (("--keep", "0-"), "lists layers and ranges"),
        (("--keep", "all"), "lists layers and ranges"),
    ],
)
def test_generate_refuses_layers_it_cannot_read(options: tuple, message: str, model_folder: Path, e3: Command) -> None:
    result = e3("generate", "--model", model_folder, "--prompt", "a", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("step", ["searched", "recovered"])
def test_report_of_a_step(step: str, results: Path, e3: Command, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(step)
    result = e3("report", folder)
    assert_done(result)
    page = Path(result.stdout.strip()).read_text(encoding="utf-8")
    assert ("Importance of each layer" in page) == (step == "searched")
    assert ("Distillation from the dense model" in page) == (step == "recovered")


def test_info_is_json_when_asked(e3: Command) -> None:
    result = e3("info", "--json")
    assert_done(result)
    facts = json.loads(result.stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["operations"]["entropy_kl"]["cpu"]["backend"] in ("reference", "native")
    assert torch.__version__ in e3("info").stdout


@pytest.mark.parametrize(
    "command", ["demo", "info", "search", "prune", "distill", "eval", "generate", "compare", "report"]
)
def test_help_teaches(command: str, e3: Command) -> None:
    result = e3(command, "--help")
    assert_done(result)
    assert f"e3 {command}" in result.stdout
    assert command in e3("--help").stdout


def test_checkpoints_can_be_published(e3, model_folder, text_file, tmp_path):
    plan = PruningPlan.of_removed([2], 6, method="greedy")
    plan.save(tmp_path / "plan.json")
    pruned, recovered = tmp_path / "pruned", tmp_path / "recovered"
    done = e3("prune", "--model", model_folder, "--plan", tmp_path / "plan.json", "--out", pruned)
    assert done.exit_code == 0, done.output
    size = ("--text", text_file, "--length", 32, "--held-out", 4, "--steps", 1)
    done = e3("distill", "--model", pruned, "--teacher", model_folder, *size, "--out", recovered)
    assert done.exit_code == 0, done.output
    for folder in (pruned, recovered):
        assert PruningPlan.load(folder / "pruning.json").removed == [2]
        card = (folder / "README.md").read_text()
        assert "5 of 6 decoder layers are left" in card
        for name in ("README.md", "pruning.json", "config.json", "tokenizer_config.json"):
            assert f"{tmp_path.parent}" not in (folder / name).read_text(), name
        modes = {path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()}
        assert modes == {folder.stat().st_mode & 0o666}
    assert "| recovered |" in card
    done = e3(
        "prune", "--model", pruned, "--plan", tmp_path / "plan.json", "--out", tmp_path / "x", "--push-to-hub", "me/it"
    )
    assert done.exit_code == 2
    assert "--push-to-hub me/it: the Hub cannot be written to" in " ".join(done.output.split())
    assert not (tmp_path / "x").exists()
