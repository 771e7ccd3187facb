"""The profile of some steps inside `transformers.Trainer` and the trainers made of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from e3pruner.compat import trainer_being_made
from e3pruner.profiling.recording import StepRecording


class ProfileCallback(TrainerCallback):
    """`Trainer(..., callbacks=[ProfileCallback("profiled", first=3, last=5)])`; the arguments of `StepRecording`.

    Given to the trainer's constructor, it ends its profile when training raises, too; added later it cannot know, and
    is to be closed: `with closing(callback): trainer.train()`. Of several processes the first one records.
    """

    def __init__(self, folder: str | os.PathLike[str], first: int = 3, last: int = 5) -> None:
        self.recording = StepRecording(folder, first, last)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Trainers tell their callbacks nothing of an error: this one's `train` closes the profile itself."""
        trainer = trainer_being_made()
        trainer.train = _closing(self, trainer.train)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            optimizer = kwargs["optimizer"]
            inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
            self.recording.begin(state.global_step + 1, kwargs["model"], [inner])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.recording.end(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.close()

    def close(self) -> None:
        """Ends a profile that is still running."""
        self.recording.close()


def _closing(callback: ProfileCallback, train: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(train)
    def closing(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        except BaseException:
            callback.close()
            raise

    return closing
