"""The profile of some steps inside `transformers.Trainer` and the trainers made of it."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from e3pruner.profiling.recording import StepRecording


class ProfileCallback(TrainerCallback):
    """`Trainer(..., callbacks=[ProfileCallback("profiled", first=3, last=5)])`; the arguments of `StepRecording`."""

    def __init__(self, folder: str | os.PathLike[str], first: int = 3, last: int = 5) -> None:
        self.recording = StepRecording(folder, first, last)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self.recording.begin(state.global_step + 1, kwargs["model"], [inner])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.recording.end(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.recording.close()
