"""docs/errors.md: every error on the page is raised, and in the words of the page."""

import re
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Command, pipeline_file
from cli.conftest import e3 as e3
from cli.conftest import model_folder as model_folder

from e3pruner import PruningPlan

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
SAID = re.findall(r"^\| `(.+?)` \| .+ \| .+ \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
SEARCH: dict[str, tuple[Any, ...]] = {
    "--model … is neither": ("--model", "nowhere"),
    "device=": ("--device", "cuda:99"),
    "drop=6 …": ("--drop", 6),
    "drop=2 is": ("--drop", 2, "--fraction", 0.5),
    "method=": ("--method", "gumbel-top"),
    "stepz": ("--search", "stepz=3"),
    "steps=": ("--search", "steps=x"),
    "--search must": ("--search", "steps"),
    "quota='attention'": ("--quota", "attention"),
    "quota: a llama": ("--quota", "full_attention=2"),
    "--text … does": ("--text", "nowhere.txt"),
    "--sequences": ("--drop", 2, "--sequences", 9999),
}
TEXT = {
    "--text … is no UTF-8": ("a.txt", b"caf\xe9 " * 1000),
    "--text …: it holds": ("a.txt", b" \n"),
    "--text …: split": ("a.txt", b"a few words"),
    "--text …, record": ("a.jsonl", b'{"txt": "a"}\n'),
    "--text …, line": ("a.jsonl", b'{"te'),
}


def damaged(model: Path, folder: Path, said: str) -> Path:
    """The model without its tokenizer, or with a configuration that is wrong."""
    folder.mkdir()
    for file in model.iterdir():
        if "no tokenizer" not in said or file.name in ("config.json", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "config.json"
    change = {
        "tensors that": ('"num_hidden_layers": 6', '"num_hidden_layers": 8'),
        "config.json": ('"llama"', '"lama"'),
    }
    for start, (old, new) in change.items():
        if said.startswith(start):
            config.write_text(config.read_text().replace(old, new).replace('"layer_types"', '"_"'))
    return folder


def call(said: str, model: Path, text: Path, folder: Path) -> tuple[Any, ...]:
    """The command that gives the error."""
    search = ("search", "--model", model, "--text", text, "--length", 32, "--out", folder / "out")
    for start, given in SEARCH.items():
        if said.startswith(start):
            return (*search, *given)
    for start, (name, content) in TEXT.items():
        if said.startswith(start):
            (folder / name).write_bytes(content)
            return (*search, "--text", folder / name)
    if said.startswith("--prompts"):
        return ("eval", "--model", model, "--prompts", text)
    if said.startswith("unknown keys"):
        (folder / "options.yaml").write_text("dorp: 3")
        return (*search, "--config", folder / "options.yaml")
    if said.startswith("--compensate"):
        settings = {"model": str(model), "text": str(text), "compensate": "auto"}
        return ("run", pipeline_file(folder, **settings), "--out", folder / "out")
    if said.startswith(("pruning.json", "12 layers")):
        plan = folder / "pruning.json"
        PruningPlan.of_removed([3], 12).save(plan) if said.startswith("12") else plan.write_text("{")
        return ("prune", "--model", model, "--plan", plan, "--out", folder / "out")
    return (*search, "--model", damaged(model, folder / "damaged", said))


@pytest.mark.parametrize("said", SAID)
def test_the_error_is_raised_in_these_words(
    said: str, model_folder: Path, text_file: Path, tmp_path: Path, e3: Command
) -> None:
    result = e3(*call(said, model_folder, text_file, tmp_path))
    assert result.exit_code == 2, result.output
    pattern = ".*".join(re.escape(part) for part in re.split(" ?… ?|; ", said))
    assert re.search(pattern, " ".join(result.stderr.replace("│", " ").split())), result.stderr
    assert not (tmp_path / "out").exists()


def test_the_page_has_as_many_errors_as_it_has_rows() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(SAID) == len(set(SAID)) == len(rows) == 25
