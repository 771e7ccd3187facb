"""e3 profile on a tiny real model."""

import json
from pathlib import Path

import pytest
from cli.conftest import Command

SMALL = {
    "model": ("--prompt", 8, "--tokens", 2, "--rounds", 1, "--removed", 2, "--dtype", "float32"),
    "step": ("--drop", 2, "--length", 16, "--batch", 2, "--rounds", 1, "--dtype", "float32"),
    "ops": ("--op", "entropy_kl", "--provider", "reference", "--rows", 4, "--vocabulary", 40, "--dtype", "float32"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", "nowhere"), "e3 profile model: error: --model nowhere"),
        (("ops", "--op", "softmax"), "e3 profile ops: error: operations has 'softmax'"),
        (("ops", "--provider", "cuda"), "providers has 'cuda'"),
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
