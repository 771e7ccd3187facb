"""`e3 demo` end to end on a tiny stand-in model, and interrupted by a real signal."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Command
from transformers import AutoModelForCausalLM

PROGRAM = "from e3pruner.cli import app; app()"


def demo_arguments(model: Path, text: Path, out: Path) -> list[Any]:
    return ["demo", "--drop", 2, "--model", model, "--text", text, "--length", 32, "--out", out]


@pytest.fixture(scope="module")
def demo(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path, e3: Command
) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "out"
    result = e3(*demo_arguments(model_folder, text_file, out))
    assert result.exit_code == 0, result.output
    return out, result.stdout


def test_demo_leaves_everything(demo: tuple[Path, str]) -> None:
    plots = {"importance.png", "mask_path.png", "curve.png", "recovery.png"}
    files = {"pruned", "recovered", "pruning.json", "results.json", "report.html", "e3.yaml"}
    assert {path.name for path in demo[0].iterdir()} == plots | files


def test_demo_prints_one_table(demo: tuple[Path, str]) -> None:
    out, printed = demo
    lines = printed.splitlines()
    rows = ["dense", "pruned", "pruned by leave-one-out", "pruned by bi", "recovered"]
    assert [line.split("│")[1].strip() for line in lines if line.startswith("│")] == rows
    for heading in ("layers", "parameters", "held-out KL", "perplexity", "top-1 agreement", "decode tokens/s"):
        assert heading in printed
    assert lines[-1] == str(out / "report.html")


def test_demo_keeps_its_figures(demo: tuple[Path, str]) -> None:
    results = json.loads((demo[0] / "results.json").read_text())
    assert [model["layers"] for model in results["models"]] == [6, 4, 4]
    assert len(results["removed"]) == 2
    assert len(results["importance"]) == results["layers"] == 6
    assert [method["method"] for method in results["methods"]] == ["gumbel-topk", "leave-one-out", "bi"]
    assert len(results["generations"]) == 3
    assert all(set(item["answers"]) == {"dense", "pruned", "recovered"} for item in results["generations"])
    dense, pruned, recovered = results["models"]
    assert dense["unseen_kl"] == 0
    assert min(pruned["unseen_kl"], recovered["unseen_kl"]) > 0
    assert pruned["unseen_perplexity"] != pruned["perplexity"]
    for method in results["methods"]:
        (first, kl), last = results["curve"][method["method"]]
        assert first == 1
        assert 0 < kl < method["kl"]
        assert last == [2, method["kl"]]


@pytest.mark.parametrize("name", ["pruned", "recovered"])
def test_demo_exports_vanilla_models(name: str, demo: tuple[Path, str]) -> None:
    assert AutoModelForCausalLM.from_pretrained(demo[0] / name).config.num_hidden_layers == 4


def test_an_interrupted_demo_ends_as_if_it_had_not_been(
    demo: tuple[Path, str], model_folder: Path, text_file: Path, tmp_path: Path, e3: Command
) -> None:
    out = tmp_path / "out"
    arguments = [str(argument) for argument in demo_arguments(model_folder, text_file, out)]
    # A shell that runs the tests in its background has its children ignore Ctrl-C.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-c", PROGRAM, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        while process.poll() is None and not (tmp_path / "out.partial" / "stage-1-search.json").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr
        errors = process.stderr.read()
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors
    assert not out.exists()

    assert e3(*arguments).exit_code == 0
    assert (out / "pruning.json").read_bytes() == (demo[0] / "pruning.json").read_bytes()
    weights = "recovered/model.safetensors"
    assert (out / weights).read_bytes() == (demo[0] / weights).read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_demo_refuses_to_remove_every_layer(tmp_path: Path, model_folder: Path, text_file: Path, e3: Command) -> None:
    arguments = demo_arguments(model_folder, text_file, tmp_path / "out")
    result = e3(*arguments, "--drop", 6)
    assert result.exit_code == 2
    assert "drop=6" in result.stderr
    assert list(tmp_path.iterdir()) == []
