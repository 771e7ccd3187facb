"""Two calls on one folder: the second is told, and the first is not disturbed."""

from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokens

import e3pruner
from e3pruner.storage import locked


def test_a_cache_that_another_makes_is_left_alone(tmp_path: Path) -> None:
    teacher, half = tiny_model("llama"), tmp_path / "cache" / ".shard-00000.safetensors.1.tmp"
    half.parent.mkdir()
    half.write_text("of the other process")
    with locked(tmp_path / "cache"), pytest.raises(FileExistsError, match="is being written by process"):
        e3pruner.cache_teacher(teacher, tiny_tokens(), tmp_path / "cache")
    assert half.exists()
    assert e3pruner.cache_teacher(teacher, tiny_tokens(), tmp_path / "cache", force=True).manifest["sequences"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_training_of_another_is_left_alone(tmp_path: Path) -> None:
    teacher = tiny_model("llama")
    student = e3pruner.prune(teacher, [0, 1, 2])
    with locked(tmp_path / "run"), pytest.raises(FileExistsError, match="is being written by process"):
        e3pruner.distill(student, teacher=teacher, data=tiny_tokens(), output=tmp_path / "run", steps=1)
    assert list(tmp_path.iterdir()) == []
    e3pruner.distill(student, teacher=teacher, data=tiny_tokens(), output=tmp_path / "run", steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
