"""e3 profile on a tiny real model."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from cli.conftest import Command

import e3kernels
from e3kernels.profiling import named_range
from e3pruner.cli.commands import profile
from e3pruner.profiling import fit

SMALL = {
    "model": ("--prompt", 8, "--tokens", 2, "--rounds", 1, "--limit", 0, "--removed", 2, "--dtype", "float32"),
    "step": ("--drop", 2, "--length", 16, "--batch", 2, "--rounds", 1, "--limit", 0, "--dtype", "float32"),
    "ops": (
        "--op",
        "entropy_kl",
        "--provider",
        "reference",
        "--rows",
        4,
        "--vocabulary",
        40,
        "--dtype",
        "float32",
        "--limit",
        0,
    ),
}


@pytest.mark.parametrize("kind", ["model", pytest.param("step", marks=pytest.mark.slow), "ops"])
def test_each_profile_leaves_a_page(
    kind: str, model_folder: Path, text_file: Path, tmp_path: Path, e3: Command
) -> None:
    subject = () if kind == "ops" else (model_folder,)
    text = ("--text", text_file) if kind == "step" else ()
    result = e3("profile", kind, *subject, *SMALL[kind], *text, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "profile.html" in result.output
    assert (tmp_path / "out" / "profile.html").exists()
    rows = [json.loads(line) for line in (tmp_path / "out" / "profile.jsonl").read_text().splitlines()]
    assert rows[0]["kind"] == "run"
    assert rows[0]["machine"]
    assert "Not reliable: " in result.output  # nothing is known of what was measured once
    assert rows[0]["doubts"]
    assert "Meanwhile the load average was" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", "nowhere"), "e3 profile model: error: --model nowhere"),
        (("ops", "--op", "softmax"), "e3 profile ops: error: --op has 'softmax'"),
        (("ops", "--provider", "cuda"), "--provider has 'cuda'"),
        (("ops", "--dtype", "int8"), "--dtype has 'int8'"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path, e3: Command) -> None:
    result = e3("profile", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_a_speedup_that_is_none(model_folder: Path, tmp_path: Path, e3: Command) -> None:
    result = e3("profile", "model", model_folder, "--speedup", 1, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "--speedup 1.0 must be above 1" in " ".join(result.output.split())


def test_no_permission_to_write(model_folder: Path, tmp_path: Path, e3: Command) -> None:
    (tmp_path / "file").write_text("")
    result = e3("profile", "model", model_folder, *SMALL["model"], "--out", tmp_path / "file" / "out")
    assert result.exit_code in (1, 2)
    assert str(tmp_path / "file") in "".join(result.output.split())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("model", ("--prompt", 62, "--tokens", 3), "prompt=62 with tokens=3 makes sequences of 65 tokens"),
        (
            "step",
            ("--length", 513, "--drop", 2, "--rounds", 1, "--batch", 1),
            "length=513 makes sequences of 513 tokens",
        ),
    ],
)
def test_more_tokens_than_positions(
    kind: str, options: tuple[object, ...], message: str, model_folder: Path, tmp_path: Path, e3: Command
) -> None:
    """It used to be said of "the context" or of "data", of a step only after the search had measured every layer."""
    result = e3("profile", kind, model_folder, *options, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{message}; the model (llama) has 64 positions" in " ".join(result.output.split())


@pytest.mark.parametrize("kind", ["model", "step"])
def test_weights_that_do_not_fit_are_not_loaded(
    kind: str, model_folder: Path, tmp_path: Path, e3: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "available", lambda device: 1 << 10)
    monkeypatch.setattr(profile, "load_model", lambda *args, **kwargs: pytest.fail("it was loaded"))
    result = e3("profile", kind, model_folder, *SMALL[kind], "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "GiB of weights in float32, cpu has 0.0 GiB free" in " ".join(result.output.split())


def test_options_from_a_file(tmp_path: Path, e3: Command) -> None:
    """--dtype was once called type_ there."""
    values = {"op": ["entropy_kl"], "provider": ["reference"], "rows": 4, "vocabulary": 40, "dtype": ["float32"]}
    values |= {"rounds": 1, "limit": 0}
    (tmp_path / "ops.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    result = e3("profile", "ops", "--config", tmp_path / "ops.yaml", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert yaml.safe_load((tmp_path / "out" / "e3.yaml").read_text())["dtype"] == ["float32"]


def test_a_profile_says_what_changed_since(tmp_path: Path, e3: Command) -> None:
    assert e3("profile", "ops", *SMALL["ops"], "--out", tmp_path / "old").exit_code == 0
    result = e3("profile", "ops", *SMALL["ops"], "--compare", tmp_path / "old", "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "times changed beyond their spread" in " ".join(result.output.split())
    names = [json.loads(line).get("name") for line in (tmp_path / "new" / "profile.jsonl").read_text().splitlines()]
    assert "entropy_kl, float32, reference" in names


def test_an_earlier_profile_is_read_before_anything_is_measured(
    model_folder: Path, tmp_path: Path, e3: Command
) -> None:
    (tmp_path / "old.jsonl").write_text('{"kind": "run"}\n', encoding="utf-8")
    for arguments in (("ops",), ("model", model_folder), ("step", model_folder)):
        result = e3("profile", *arguments, "--compare", tmp_path / "old.jsonl", "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert "is no profile with rows of the kind" in " ".join(result.output.split())
        assert not (tmp_path / "out").exists()


def test_any_profiled_block_has_a_page(tmp_path: Path, e3: Command) -> None:
    """README promised one, and nothing made it."""
    with e3kernels.profile(tmp_path / "recorded"), named_range("student forward"):
        torch.ones(64, 64) @ torch.ones(64, 64)
    result = e3("profile", "trace", tmp_path / "recorded", "--out", tmp_path / "page")
    assert result.exit_code == 0, result.output
    assert "pass in student forward" in result.output
    text = (tmp_path / "page" / "profile.html").read_text(encoding="utf-8")
    assert "aten::matmul" in text
    assert "Reliable" not in text  # nobody watched the machine
    nothing = e3("profile", "trace", tmp_path / "page", "--out", tmp_path / "none")
    assert nothing.exit_code == 2
    assert not (tmp_path / "none").exists()


def test_a_pipe_that_closes_does_not_cost_the_page(
    tmp_path: Path, e3: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`e3 profile ops | head -1`"""

    def closed(*args: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(profile, "rich_table", closed)
    result = e3("profile", "ops", *SMALL["ops"], "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert (tmp_path / "out" / "profile.html").exists()
