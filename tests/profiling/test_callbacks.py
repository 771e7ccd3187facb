"""The profile of some steps in the trainers that people use."""

import json
import warnings

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from e3pruner import prune
from e3pruner.profiling.integrations.trainer import ProfileCallback
from e3pruner.profiling.recording import StepRecording
from e3pruner.recovery.integrations.trainer import DistillTrainer


def examples(count=24):
    ids = torch.randint(3, VOCAB_SIZE, (count, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, accumulation=1):
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )


def rows_of(folder, kind):
    rows = [json.loads(line) for line in (folder / "profile.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_a_distilling_trainer(tmp_path):
    teacher = tiny_model("llama")
    callback = ProfileCallback(tmp_path / "profiled", first=2, last=3)
    DistillTrainer(
        prune(teacher, [0, 1, 3, 5]),
        arguments(tmp_path, accumulation=2),
        train_dataset=examples(),
        teacher=teacher,
        callbacks=[callback],
    ).train()
    phases = {row["phase"]: row["seconds"] for row in rows_of(tmp_path / "profiled", "phase")}
    assert {"teacher forward", "student forward", "loss", "backward", "optimizer", "rest"} <= set(phases)
    (step,) = rows_of(tmp_path / "profiled", "step")
    assert sum(phases.values()) == pytest.approx(step["seconds"], rel=1e-6)
    assert (tmp_path / "profiled" / "trace.json").exists()
    assert "Steps 2 to 3" in (tmp_path / "profiled" / "profile.html").read_text()


def test_any_trainer_of_transformers(tmp_path):
    Trainer(
        tiny_model("llama"),
        arguments(tmp_path),
        train_dataset=examples(),
        callbacks=[ProfileCallback(tmp_path / "profiled", first=3, last=9)],  # training ends before
    ).train()
    phases = {row["phase"]: row["seconds"] for row in rows_of(tmp_path / "profiled", "phase")}
    assert {"forward", "backward", "optimizer", "rest"} <= set(phases)
    assert "Steps 3 to 4" in (tmp_path / "profiled" / "profile.html").read_text()
    (memory,) = rows_of(tmp_path / "profiled", "memory")
    parameters = sum(p.nbytes for p in tiny_model("llama").parameters())
    assert memory["categories"]["weights"] == parameters
    assert memory["categories"]["activations"] > 0
    assert memory["categories"]["optimizer"] >= 2 * parameters


@pytest.mark.parametrize("accumulation", [1, 2])
def test_lightning(tmp_path, accumulation):
    lightning = pytest.importorskip("lightning", reason="needs e3kernels[lightning]")
    from e3pruner.profiling.integrations.lightning import ProfileCallback as LightningCallback
    from e3pruner.recovery.integrations.lightning import DistillMixin

    class Module(DistillMixin):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.student.parameters(), lr=1e-3)

    teacher = tiny_model("llama")
    collate = lambda items: {name: torch.stack([item[name] for item in items]) for name in items[0]}  # noqa: E731
    lightning.Trainer(
        max_steps=3,
        accumulate_grad_batches=accumulation,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[LightningCallback(tmp_path / "profiled", first=2, last=2)],
    ).fit(Module(prune(teacher, [0, 1, 3, 5]), teacher), DataLoader(examples(), batch_size=2, collate_fn=collate))
    phases = {row["phase"]: row["seconds"] for row in rows_of(tmp_path / "profiled", "phase")}
    assert {"teacher forward", "student forward", "loss", "backward", "optimizer", "rest"} <= set(phases)
    trace = json.loads((tmp_path / "profiled" / "trace.json").read_text())["traceEvents"]
    forwards = [e for e in trace if e.get("cat") == "user_annotation" and e["name"] == "student forward"]
    assert len(forwards) == accumulation


def test_the_trace_numbers_its_steps(tmp_path):
    Trainer(
        tiny_model("llama"),
        arguments(tmp_path),
        train_dataset=examples(),
        callbacks=[ProfileCallback(tmp_path / "profiled", first=2, last=3)],
    ).train()
    trace = json.loads((tmp_path / "profiled" / "trace.json").read_text())["traceEvents"]
    steps = [e["name"] for e in trace if e.get("cat") == "user_annotation" and e["name"].startswith("ProfilerStep")]
    assert steps == ["ProfilerStep#2", "ProfilerStep#3"]


class Breaking(Trainer):
    """Raises in a batch of its third step."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == 2:
            raise OverflowError("the data ended")
        return loss


@pytest.mark.parametrize(("first", "recorded"), [(3, None), (2, "Step 2")])
def test_training_that_raises_ends_the_profile(tmp_path, first, recorded):
    """Of a step that broke off nothing is left; those before it are shown."""
    trainer = Breaking(
        tiny_model("llama"),
        arguments(tmp_path),
        train_dataset=examples(),
        callbacks=[ProfileCallback(tmp_path / "profiled", first=first, last=4)],
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(OverflowError):
            trainer.train()
    assert not torch.autograd._profiler_enabled()
    assert "forward" not in vars(trainer.model)
    assert [path.name for path in tmp_path.iterdir() if "profiled" in path.name] == ["profiled"] * bool(recorded)
    if recorded is None:
        assert "no step from first=3 to last=4" in str(said[-1].message)
    else:
        assert f"<h1>{recorded}</h1>" in (tmp_path / "profiled" / "profile.html").read_text()


def test_a_run_that_is_too_short_says_that_nothing_was_recorded(tmp_path):
    trainer = Trainer(
        tiny_model("llama"),
        arguments(tmp_path),
        train_dataset=examples(),
        callbacks=[ProfileCallback(tmp_path / "profiled", first=9, last=9)],
    )
    with pytest.warns(UserWarning, match="no step from first=9 to last=9 came to its end"):
        trainer.train()
    assert not (tmp_path / "profiled").exists()


def test_a_folder_that_is_there_is_not_replaced(tmp_path):
    (tmp_path / "report.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists, and a profile replaces nothing"):
        ProfileCallback(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.txt"]


@pytest.mark.parametrize(("first", "last"), [(0, 2), (3, 2)])
def test_steps_are_checked(tmp_path, first, last):
    with pytest.raises(ValueError, match=f"first={first}, last={last}"):
        StepRecording(tmp_path, first, last)
