"""Every file of `examples/` on a tiny model, and what they have in common: the same step, however it is split."""

from pathlib import Path

import pytest
import torch
from cli.conftest import byte_tokenizer
from ranks import run_script
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from e3pruner import PruningPlan, prune, search

NEEDED = {"trl_sft": "trl", "lightning_module": "lightning"}
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """student, teacher and tokens of three steps of eight."""
    folder = tmp_path_factory.mktemp("examples")
    tokenizer = byte_tokenizer()
    teacher = tiny_model("llama", vocab_size=len(tokenizer))
    for name, model in (("teacher", teacher), ("student", prune(teacher, [0, 1, 4, 5]))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tokens = torch.randint(3, len(tokenizer), (24, 12), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": tokens}, folder / "tokens.safetensors")
    return folder


def trained(folder, example, processes=0):
    """The weights after the three steps of an example."""
    if example in NEEDED:  # imported here once for all the processes forked below
        pytest.importorskip(NEEDED[example], reason=f"needs e3kernels[{NEEDED[example]}]")
    out = folder / f"{example}{processes}"
    if not out.exists():
        paths = [folder / "student", folder / "teacher", folder / "tokens.safetensors", out]
        if example == "ddp":
            options = ("--student", "--teacher", "--tokens", "--out")
            paths = [part for pair in zip(options, paths, strict=True) for part in pair] + ["--steps", 3]
        run_script(EXAMPLES / f"{example}.py", *paths, processes=processes)
    return load_file(out / "model.safetensors")


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_all_examples_are_tested():
    tested = {"accelerate_loop", "ddp", "fsdp2", "lightning_module", "plain_loop", "transformers_trainer", "trl_sft"}
    assert {file.stem for file in EXAMPLES.glob("*.py")} == tested | {"distributed_search"}


def test_the_search_finds_the_plan_of_one_process(folder):
    teacher, tokens, out = folder / "teacher", folder / "tokens.safetensors", folder / "pruning.json"
    run_script(
        EXAMPLES / "distributed_search.py",
        *["--model", teacher, "--tokens", tokens, "--out", out, "--drop", 2],
        processes=2,
    )
    model = AutoModelForCausalLM.from_pretrained(teacher)
    expected = search(model, load_file(tokens)["input_ids"].split(8), 2)
    assert PruningPlan.load(out).keep == expected.keep


@pytest.mark.parametrize("example", ["plain_loop", "transformers_trainer", "trl_sft"])
def test_an_example_trains(folder, example):
    before = load_file(folder / "student" / "model.safetensors")
    after = trained(folder, example)
    assert after.keys() == before.keys()
    assert all(not torch.equal(before[name], weight) for name, weight in after.items())


@pytest.mark.parametrize(
    ("example", "processes"), [("lightning_module", 0), ("accelerate_loop", 0), ("accelerate_loop", 2)]
)
def test_the_same_steps_in_another_loop(folder, example, processes):
    assert_near(trained(folder, example, processes), trained(folder, "plain_loop"))


def test_fsdp2_on_two_processes_equals_one_and_ddp(folder):
    sharded = trained(folder, "fsdp2", 2)
    assert_near(sharded, trained(folder, "fsdp2", 1))
    assert_near(sharded, trained(folder, "ddp", 1))
