"""Wrong input to the sub-commands: exit code 2, one line that says what is wrong, nothing left behind."""

from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Command
from transformers import T5Config, T5ForConditionalGeneration

from e3pruner import PruningPlan


def search_arguments(folder: Path, network: Path, prose: Path, **changes: Any) -> list[Any]:
    options = {
        "model": network,
        "text": prose,
        "drop": 2,
        "length": 32,
        "sequences": 2,
        "out": folder / "out",
    } | changes
    return ["search", *(part for name, value in options.items() for part in (f"--{name}", value))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": 6}, "drop=6"),
        ({"drop": 0}, "drop=0"),
        ({"drop": -1}, "drop=-1"),
        ({"protect": 6}, "protect"),
        ({"method": "magic"}, "magic"),
        ({"option": "magic=1"}, "magic"),
        ({"model": "no-such-folder"}, "--model no-such-folder"),
        ({"sequences": 9999}, "--sequences 9999"),
        ({"length": 1 << 20}, "--length"),
        ({"text": "no-such-file"}, "no-such-file"),
    ],
)
def test_search_refuses(
    changes: dict[str, Any], message: str, tmp_path: Path, model_folder: Path, text_file: Path, e3: Command
) -> None:
    result = e3(*search_arguments(tmp_path, model_folder, text_file, **changes))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_protecting_more_layers_than_may_stay(tmp_path: Path, model_folder: Path, text_file: Path, e3: Command) -> None:
    protect = [part for layer in range(5) for part in ("--protect", layer)]
    result = e3(*search_arguments(tmp_path, model_folder, text_file), *protect)
    assert result.exit_code == 2
    assert "protect" in result.stderr


def test_text_that_is_not_utf8(tmp_path: Path, model_folder: Path, e3: Command) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes(b"caf\xe9 " * 1000)
    result = e3(*search_arguments(tmp_path, model_folder, text))
    assert result.exit_code == 2
    assert "UTF-8" in result.stderr


def test_a_model_without_a_decoder_stack(tmp_path: Path, text_file: Path, model_folder: Path, e3: Command) -> None:
    config = T5Config(vocab_size=99, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, decoder_start_token_id=0)
    folder = tmp_path / "t5"
    T5ForConditionalGeneration(config).save_pretrained(folder)
    for file in model_folder.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    result = e3(*search_arguments(tmp_path, folder, text_file))
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"kept": [0], "removed": [9]}'])
def test_a_damaged_plan(content: str, tmp_path: Path, model_folder: Path, e3: Command) -> None:
    plan = tmp_path / "pruning.json"
    plan.write_text(content)
    result = e3("prune", "--model", model_folder, "--plan", plan, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "pruning.json is not a pruning plan" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pruning.json"]


def test_a_plan_of_another_model(tmp_path: Path, model_folder: Path, e3: Command) -> None:
    PruningPlan.of_removed([3], 12).save(tmp_path / "pruning.json")
    result = e3("prune", "--model", model_folder, "--plan", tmp_path / "pruning.json", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "12 layers" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pruning.json"]


def test_a_model_without_a_tokenizer(tmp_path: Path, model_folder: Path, text_file: Path, e3: Command) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_bytes((model_folder / file).read_bytes())
    result = e3(*search_arguments(tmp_path, folder, text_file))
    assert result.exit_code == 2
    assert "no tokenizer" in result.stderr


def test_a_damaged_checkpoint_of_the_model(tmp_path: Path, model_folder: Path, text_file: Path, e3: Command) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").write_bytes(b"not tensors")
    result = e3(*search_arguments(tmp_path, folder, text_file))
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_report_of_no_result(tmp_path: Path, e3: Command) -> None:
    result = e3("report", tmp_path)
    assert result.exit_code == 2
    assert "results.json" in result.stderr
    assert list(tmp_path.iterdir()) == []
