"""Curves in TensorBoard's own files, read back by TensorBoard."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from recovery.test_distill import FP32, Disturbed, sequences
from tiny_models import tiny_model

from e3pruner import prune
from e3pruner.recovery import distill, tracking

KEPT = [0, 1, 5]
HELD_OUT = {f"held_out/{name}" for name in ("kl", "perplexity", "top1_agreement")}


@pytest.fixture(scope="module")
def teacher():
    return tiny_model("llama")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by the name of the curve."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs e3kernels[track]"
    ).EventAccumulator(str(folder / tracking.PROJECT))
    accumulator.Reload()
    return {
        name: [(event.step, event.value) for event in accumulator.Scalars(name)]
        for name in accumulator.Tags()["scalars"]
    }


def expected_curves(result) -> dict[str, list]:
    found: dict[str, list] = {}
    for kind, records in (("train", result.curve), ("held_out", result.held_out)):
        for record in records:
            for name in record.keys() - {"step"}:
                found.setdefault(f"{kind}/{name}", []).append((record["step"], pytest.approx(record[name], rel=1e-6)))
    return found


def test_a_killed_run_goes_on_with_its_curves(teacher, tmp_path):
    options = FP32 | {"data": sequences(16), "held_out": sequences(4, 1), "steps": 6, "save_every": 3, "eval_every": 2}
    options |= {"output": tmp_path / "run", "track": "tensorboard"}
    # Dies in its sixth step, two steps after its last state; one batch of held-out text comes first.
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        killer = Disturbed(teacher, 6, lambda hidden: os.kill(os.getpid(), signal.SIGKILL))
        distill(prune(teacher, KEPT), teacher=killer, **options)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [step for step, _ in curves(tmp_path / "run")["train/loss"]] == [1, 2, 3, 4, 5]
    time.sleep(1)  # event files are in order by the second they were begun in
    result = distill(prune(teacher, KEPT), teacher=teacher, resume=True, **options)
    assert curves(tmp_path / "run") == expected_curves(result)
    assert {f"train/{name}" for name in ("loss", "lr", "grad_norm")} | HELD_OUT == expected_curves(result).keys()


def test_a_run_begun_again_voids_the_curves_of_the_first(teacher, tmp_path):
    options = FP32 | {"data": sequences(16), "held_out": sequences(4, 1), "output": tmp_path / "run", "force": True}
    options |= {"track": "tensorboard", "track_folder": tmp_path / "curves"}
    for steps in (3, 2):
        result = distill(prune(teacher, KEPT), teacher=teacher, steps=steps, **options)
        assert curves(tmp_path / "curves") == expected_curves(result)


def test_what_cannot_be_shown_is_refused_before_anything_starts(teacher, tmp_path, monkeypatch):
    options = FP32 | {"data": sequences(16), "teacher": teacher, "output": tmp_path / "run"}
    with pytest.raises(ValueError, match="track='paper' must be one of tensorboard, wandb, trackio"):
        distill(prune(teacher, KEPT), track="paper", **options)
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(ModuleNotFoundError, match="track='wandb' needs the package wandb"):
        distill(prune(teacher, KEPT), track="wandb", **options)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="track='tensorboard' needs track_folder or output"):
        distill(prune(teacher, KEPT), track="tensorboard", **options | {"output": None})
