"""The search benches run on a tiny model, go on where they were, and write their tables."""

import json
from pathlib import Path

import pytest
import yaml
from search import growing, healed, healing_ranks


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("kinds")
    for number in (2, 3):
        (folder / str(number)).write_text(" ".join(str(n**number) for n in range(900)), encoding="utf-8")
    return [str(folder / "2"), str(folder / "3")]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_growing_text(model_folder: Path, kinds: list[str], tmp_path: Path) -> None:
    given = ["--model", str(model_folder), "--text", kinds[0], "--length", "32", "--tokens", "128", "--drops", "2"]
    given += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.jsonl")]
    growing.main([*given, "--seeds", "0", "--only", "default"])
    growing.main([*given, "--seeds", "0"])
    found = {row["search"]: row for row in rows(tmp_path / "out.jsonl")}
    assert list(found) == ["default", "10 × budget", "greedy"]
    assert found["10 × budget"]["steps"] > found["default"]["steps"]
    assert all(row["tokens"] == 128 and len(row["removed"]) == 2 for row in found.values())


def test_healed_beside_raw(model_folder: Path, kinds: list[str], tmp_path: Path) -> None:
    given = ["--model", str(model_folder), "--text", kinds[0], "--unseen", kinds[1], "--length", "32"]
    given += ["--held-out", "3"]
    given += ["--drops", "2", "--seeds", "0", "--tokens", "256", "--rungs", "3x64,2x128", "--sequences", "4"]
    given += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.jsonl")]
    healed.main(given)
    before = rows(tmp_path / "out.jsonl")
    assert [row["objective"] for row in before] == ["raw", "healed"]
    assert list(before[0]["held_out"]) == [kinds[1]]
    table = (tmp_path / "out.md").read_text()
    assert "±" in table.splitlines()[-1]
    healed.main(given)
    assert rows(tmp_path / "out.jsonl") == before


def test_ranks_after_recoveries(model_folder: Path, kinds: list[str], tmp_path: Path) -> None:
    settings = yaml.safe_load((Path(healing_ranks.__file__).parent / "healing_ranks.yaml").read_text())
    settings |= {"model": str(model_folder), "text": kinds[:1], "unseen": kinds[1:], "length": 32, "held_out": 3}
    settings |= {"masks": [[1, 2], [0, 4], [3, 4]], "ways": {"cut": {}, "norms": {"tokens": 64, "trainable": "norms"}}}
    (tmp_path / "ranks.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    given = [str(tmp_path / "ranks.yaml"), "--out", str(tmp_path / "out.jsonl")]
    healing_ranks.main([*given, "--only", "cut"])
    healing_ranks.main(given)
    assert [row["way"] for row in rows(tmp_path / "out.jsonl")] == ["cut"] * 3 + ["norms"] * 3
    correlation = next(line for line in (tmp_path / "out.md").read_text().splitlines() if "rank correlation" in line)
    assert correlation.split("|")[-2].strip() == "1.00"
