"""The bench's table of recoveries on a tiny model: every cell of its YAML runs, and none runs twice."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from cli.conftest import byte_tokenizer
from recovery import table
from tiny_models import tiny_model

from e3pruner.profiling.process_memory import peak_above_inputs

RECOVERIES = Path(table.__file__).parent / "recoveries.yaml"


@pytest.fixture
def config(tmp_path):
    """The bench's own cells over a tiny model and 3 steps."""
    tokenizer = byte_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = " ".join(map(str, range(2000)))  # no two passages alike
    (tmp_path / "text.txt").write_text(text)
    settings = yaml.safe_load(RECOVERIES.read_text())
    settings |= {"model": str(tmp_path / "model"), "text": [str(tmp_path / "text.txt")], "removed": [2, 3]}
    settings |= {"length": 16, "batch": 2, "tokens": 96, "calibration": 8, "held_out": 4}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return tmp_path / "config.yaml"


def test_every_cell_is_measured_once(config, tmp_path, monkeypatch):
    out = tmp_path / "recovery.jsonl"
    arguments = [str(config), "--work", str(tmp_path / "work"), "--out", str(out)]
    table.main([*arguments, "--only", "none", "compensation"])
    assert [json.loads(line)["cell"] for line in out.read_text().splitlines()] == ["dense", "none", "compensation"]
    assert "Teacher cache" not in out.with_suffix(".md").read_text()

    measure, measured = table.Study.measure, []

    def stopping(study, name, options, seed):
        measured.append(name)
        if len(measured) == 5:
            raise KeyboardInterrupt
        return measure(study, name, options, seed)

    monkeypatch.setattr(table.Study, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        table.main(arguments)
    table.main(arguments)
    cells = list(yaml.safe_load(RECOVERIES.read_text())["cells"])
    assert measured == ["teacher cache", *cells[2:6], *cells[5:]]

    rows = {row["cell"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["dense", *cells[:2], "teacher cache", *cells[2:]]
    assert rows["dense"]["held_out"][str(tmp_path / "text.txt")]["kl"] == pytest.approx(0, abs=1e-5)
    trained = [row for row in rows.values() if "loss" in row]
    assert [len(row["loss"]) for row in trained] == [3] * (len(cells) - 2)
    # Each cell is another training: no two have the same losses, but for what is equal by definition.
    assert len({tuple(row["loss"]) for row in trained}) >= len(trained) - 1
    written = out.with_suffix(".md").read_text()
    assert [line.split("|")[1].strip() for line in written.splitlines() if line.startswith("| ")][2:] == [
        "dense",
        *cells,
    ]
    table.main(arguments)
    assert len(measured) == len(cells)

    again = {name: row for name, row in rows.items() if name != "top-10, mix"}
    out.write_text("".join(json.dumps(row) + "\n" for row in again.values()))
    shutil.rmtree(tmp_path / "work")  # another machine: the rows are here, the cache that they were trained from is not
    made_before = []

    def peak(training):
        made_before.append(any((tmp_path / "work").glob("*/cache/*.safetensors")))
        return peak_above_inputs(training)

    monkeypatch.setattr(table, "peak_above_inputs", peak)
    table.main(arguments)
    assert json.loads(out.read_text().splitlines()[-1])["loss"] == rows["top-10, mix"]["loss"]
    assert made_before == [True]  # its making is not the training's memory

    with pytest.raises(SystemExit, match="other settings"):
        table.main([*arguments, "--tokens", "64"])
    with pytest.raises(SystemExit, match="must be cells of"):
        table.main([*arguments, "--only", "magic"])
    assert torch.isfinite(torch.tensor([row["loss"] for row in trained])).all()


@pytest.mark.slow
def test_cells_are_judged_on_kinds_and_tasks_that_no_step_sees(config, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "telling", list)  # a random model can do none
    long = tiny_model("llama", vocab_size=len(byte_tokenizer()), max_position_embeddings=512)
    long.save_pretrained(tmp_path / "model")
    (tmp_path / "unseen.txt").write_text(" ".join(f"word{chr(97 + n % 26) * 3} {n**2} letters" for n in range(4000)))
    unseen = str(tmp_path / "unseen.txt")
    settings = yaml.safe_load(config.read_text()) | {
        "unseen": [unseen],
        "length": 192,
        "held_out": 8,
        "tasks": True,
        "calibration": 2,
    }
    settings |= {"cells": {"none": {"teacher": "none"}, "default": {}}, "tokens": 768, "seeds": [0, 1]}
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    out = tmp_path / "by_kind.jsonl"
    table.main([str(config), "--work", str(tmp_path / "work"), "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    cells = [("dense", 0), ("none", 0), ("none", 1), ("default", 0), ("default", 1)]
    assert [(row["cell"], row["seed"]) for row in rows] == cells
    assert all(len(row["held_out"][unseen]["sequences"]["kl"]) == 8 for row in rows)
    none, default = (
        torch.tensor([row["held_out"][unseen]["sequences"]["kl"] for row in rows if row["cell"] == cell]).mean(0)
        for cell in ("none", "default")
    )
    line = next(line for line in out.with_suffix(".md").read_text().splitlines() if line.startswith("| none"))
    assert f"{float((none - default).mean()):+.3f} ± " in line
    assert "last word" in out.with_suffix(".md").read_text()
