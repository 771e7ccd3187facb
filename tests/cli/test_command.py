"""Exit codes, one-line errors, options from YAML and output folders, on a command that does nothing else."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from e3pruner.cli import options
from e3pruner.cli.command import Command, error_line
from e3pruner.cli.config import parse_options, result_folder


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


BEHAVIOUR = {
    "value": ValueError("drop=9 must be\nbelow 8"),
    "missing": FileNotFoundError("no such file"),
    "nan": FloatingPointError("KL is nan in step 3"),
    "index": KeyError("layer"),
    "disk": OSError(28, "No space left on device"),
    "interrupt": KeyboardInterrupt(),
}
app = typer.Typer()


@app.command("work", cls=Command)
def work(
    ctx: typer.Context,
    out: options.Out,
    fail: str = "",
    leave: bool = False,
    drop: Annotated[int, typer.Option(min=1)] = 8,
    colour: Colour = Colour.RED,
    protect: Annotated[list[int] | None, typer.Option()] = None,
    search: options.Search = None,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Writes its arguments, or fails as told."""
    with result_folder(ctx, out, force) as folder:
        if leave:
            (folder / "checkpoint").write_text("state")
        if fail:
            raise BEHAVIOUR[fail]
        (folder / "result").write_text(f"{drop} {colour} {protect} {parse_options(search)}")


@app.command("other", cls=Command)
def other() -> None:
    """A second command, so that the first is named on the command line."""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["work", *map(str, arguments)])


@pytest.mark.parametrize(
    ("fail", "code", "message"),
    [
        ("value", 2, "e3 work: error: drop=9 must be below 8"),
        ("missing", 2, "e3 work: error: no such file"),
        ("nan", 1, "e3 work: error: FloatingPointError: KL is nan in step 3"),
        ("index", 1, "e3 work: error: KeyError: 'layer'"),
        ("disk", 1, "e3 work: error: [Errno 28] No space left on device"),
        ("interrupt", 130, "e3 work: interrupted"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(tmp_path: Path, fail: str, code: int, message: str) -> None:
    result = run("--out", tmp_path / "out", "--fail", fail)
    assert result.exit_code == code
    assert message in result.stderr.splitlines()
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E3_DEBUG", "1")
    result = run("--out", tmp_path / "out", "--fail", "nan")
    assert isinstance(result.exception, FloatingPointError)


@pytest.mark.parametrize("error", [ValueError(), KeyError(), RuntimeError("")])
def test_an_error_without_words_names_its_type(error: Exception) -> None:
    assert error_line(error) == type(error).__name__


def test_markup_in_a_message_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BEHAVIOUR, "value", ValueError("kept=[0, 1] and [bold] stay"))
    assert "kept=[0, 1] and [bold] stay" in run("--out", tmp_path / "out", "--fail", "value").stderr


@pytest.mark.parametrize("arguments", [["--drop", "0"], ["--drop", "x"], ["--unknown", "1"], ["--colour", "green"], []])
def test_bad_usage(tmp_path: Path, arguments: list[str]) -> None:
    out = ["--out", str(tmp_path / "out")] if arguments else []
    assert run(*out, *arguments).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def config_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "options.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_options_come_from_the_file_and_the_command_line_wins(tmp_path: Path) -> None:
    text = "drop: 5\ncolour: blue\nprotect: [0, 29]\noption: {steps: 60, tau: [1, 0.05], polish: true, init: kl}\n"
    config = config_file(tmp_path, text + f"out: {tmp_path / 'out'}\n")
    assert run("--config", config, "--drop", 6).exit_code == 0
    expected = "6 blue [0, 29] {'steps': 60, 'tau': [1, 0.05], 'polish': True, 'init': 'kl'}"
    assert (tmp_path / "out" / "result").read_text() == expected


def test_resolved_options_run_again(tmp_path: Path) -> None:
    assert run("--out", tmp_path / "a", "--drop", 3, "--protect", 1, "--option", "steps=60").exit_code == 0
    saved = tmp_path / "a" / "e3.yaml"
    assert yaml.safe_load(saved.read_text())["colour"] == "red"
    assert run("--config", saved, "--out", tmp_path / "b").exit_code == 0
    assert (tmp_path / "b" / "result").read_text() == (tmp_path / "a" / "result").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dorp: 5", "unknown keys: dorp"),
        ("config: x.yaml", "unknown keys: config"),
        ("- drop", "one mapping"),
        ("drop: [", "cannot be read as YAML"),
        ("drop: many", "drop"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    result = run("--out", tmp_path / "out", "--config", config_file(tmp_path, text))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pair", ["steps", "=3", "a b=1"])
def test_a_bad_pair_is_refused(tmp_path: Path, pair: str) -> None:
    result = run("--out", tmp_path / "out", "--option", pair)
    assert result.exit_code == 2
    assert "NAME=VALUE" in result.stderr


def test_an_existing_result_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--out", out)
    result = run("--out", out, "--drop", 5)
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert (out / "result").read_text().startswith("8 ")


def test_force_replaces_a_result_only_by_a_whole_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--out", out)
    assert run("--out", out, "--drop", 5, "--force", "--fail", "nan").exit_code == 1
    assert (out / "result").read_text().startswith("8 ")
    assert run("--out", out, "--drop", 5, "--force").exit_code == 0
    assert (out / "result").read_text().startswith("5 ")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_never_deletes_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    result = run("--out", tmp_path, "--force")
    assert result.exit_code == 2
    assert "e3 did not make it" in result.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run("--out", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "result").exists()


def test_an_interrupted_run_goes_on_with_the_same_options(tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    result = run("--out", out, "--leave", "--fail", "interrupt")
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr
    assert (partial / "checkpoint").read_text() == "state"
    assert not out.exists()

    changed = run("--out", out, "--leave", "--fail", "interrupt", "--drop", 5)
    assert changed.exit_code == 2
    assert "drop 8 there, 5 here" in changed.stderr
    assert (partial / "checkpoint").exists()

    again = run("--out", out, "--leave", "--fail", "interrupt")
    assert "Going on with the unfinished run" in again.stderr
    assert run("--out", out, "--drop", 5, "--force").exit_code == 0
    assert not partial.exists()


def test_a_foreign_partial_folder_is_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "out.partial"
    foreign.mkdir()
    (foreign / "download").write_text("half")
    assert run("--out", tmp_path / "out", "--force").exit_code == 2
    assert (foreign / "download").read_text() == "half"
