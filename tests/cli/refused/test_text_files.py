"""Whatever is wrong with a text file, the error names the option and the file, and nothing is left behind."""

import json
from pathlib import Path

import pytest
from cli.conftest import Command, pipeline_file

SMALL = ("--length", 32)
CHAT = json.dumps({"messages": [{"role": "user", "content": "a"}]}).encode()
LATIN = b"caf\xe9 " * 1000
FAULTS = {  # the file's name and content, None: it is not there; what is said after option and file
    "missing": ("a.txt", None, " does not exist"),
    "folder": ("a.txt", ..., " "),
    "not UTF-8": ("a.txt", LATIN, " is no UTF-8 text: byte 3 is 0xe9"),
    "empty": ("a.txt", b"", ": it holds no text"),
    "white space": ("a.txt", b" \n\n", ": it holds no text"),
    "too short": ("a.txt", b"a few words", ": split training: 11 tokens make no sequence of --length 32"),
    "missing lines": ("a.jsonl", None, " does not exist"),
    "lines not UTF-8": ("a.jsonl", LATIN, " is no UTF-8 text: byte 3 is 0xe9"),
    "no lines": ("a.jsonl", b"\n", " holds no document"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n{"te', ", line 2 is no JSON"),
    "no document": ("a.jsonl", b'{"txt": "a"}\n', ', record 1: it must hold "text"'),
    "no chat template": (
        "a.jsonl",
        json.dumps({"messages": [{"role": "user", "content": "a"}]}).encode(),
        ", record 1",
    ),
    "too few lines": ("a.jsonl", b'{"text": "a"}\n', ": length=32: the "),
}
PLAIN = [name for name, (file, content, _) in FAULTS.items() if file == "a.txt" and content is not ...]
PROMPTS = [name for name in PLAIN if name != "too short"]


def faulty(folder: Path, fault: str) -> Path:
    name, content, _ = FAULTS[fault]
    path = folder / name
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    return path


def assert_refused(result, option: str, path: Path, said: str) -> None:
    assert result.exit_code == 2, result.output
    assert f"{option} {path}{said}" in " ".join(result.stderr.split())
    assert not (path.parent / "out").exists()
    assert not (path.parent / "out.partial").exists()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", ["search", "cache-teacher"])
def test_text(command: str, fault: str, model_folder: Path, tmp_path: Path, e3: Command) -> None:
    path, model = faulty(tmp_path, fault), "--model" if command == "search" else "--teacher"
    result = e3(command, model, model_folder, "--text", path, *SMALL, "--out", tmp_path / "out")
    assert_refused(result, "--text", path, FAULTS[fault][2])


@pytest.mark.parametrize("fault", PLAIN)
def test_text_of_another_kind(fault: str, model_folder: Path, text_file: Path, tmp_path: Path, e3: Command) -> None:
    path = faulty(tmp_path, fault)
    settings = {"model": str(model_folder), "text": str(text_file), "rounds": 1}
    said = " is neither a file nor one of manual, code, library" if fault == "missing" else FAULTS[fault][2]
    unseen = e3("run", pipeline_file(tmp_path, **settings, unseen=str(path)), "--out", tmp_path / "out")
    assert_refused(unseen, "--unseen", path, said)
    judge = e3(
        "run", pipeline_file(tmp_path, **settings, judge=str(path), compensate="auto"), "--out", tmp_path / "out"
    )
    assert_refused(judge, "--judge", path, FAULTS[fault][2])


@pytest.mark.parametrize("fault", PROMPTS)
def test_prompts(fault: str, model_folder: Path, tmp_path: Path, e3: Command) -> None:
    path = faulty(tmp_path, fault)
    result = e3("eval", "--model", model_folder, "--generate", "--prompts", path, "--out", tmp_path / "out")
    assert_refused(result, "--prompts", path, FAULTS[fault][2])
