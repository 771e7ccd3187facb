"""The bench's exchanges around a searched mask, on a tiny real model."""

import json
from pathlib import Path

import pytest
import yaml
from cli.conftest import Command
from search import exchanges
from tiny_models import NUM_LAYERS

from e3pruner.pipelines.comparison import CELLS_FILE, read_rows


@pytest.fixture
def matrix(model_folder: Path, text_file: Path, tmp_path: Path) -> Path:
    settings = {"model": str(model_folder), "text": [str(text_file)], "methods": ["greedy"], "drop": [2], "seeds": [0]}
    sizes = {"sequences": 4, "held_out": 12, "length": 32, "precision": "fp32"}
    path = tmp_path / "matrix.yaml"
    path.write_text(yaml.safe_dump(settings | sizes), encoding="utf-8")
    return path


def test_every_exchange_around_a_mask_is_tried(matrix: Path, tmp_path: Path, e3: Command) -> None:
    folder = tmp_path / "out"
    assert e3("compare", matrix, "--out", folder).exit_code == 0
    (row,) = read_rows(folder / CELLS_FILE)
    exchanges.main([str(matrix), "--compared", str(folder), "--drop", "2"])
    (found,) = json.loads((folder / "exchanges-2.json").read_text())["masks"]
    kept = NUM_LAYERS - 2
    assert found["removed"] == sorted(row["removed"])
    assert found["measured"] == 2 * kept + kept * (kept - 1) // 2
    assert len(found["best_exchange"]) == 2
    assert found["best_exchange"] != found["removed"]
    assert found["calibration_ratio"] > 0
    assert found["ratio"] == found["kl_of_exchange"] / found["kl"] > 0


def test_what_was_not_compared_is_refused(matrix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        exchanges.main([str(matrix), "--compared", str(tmp_path / "out"), "--drop", "2"])
    assert "has no cell of greedy with 2 layers removed" in capsys.readouterr().err
