"""The profile of some steps inside `lightning.Trainer`."""

from __future__ import annotations

import os
from typing import Any

from lightning import Callback, LightningModule, Trainer

from e3pruner.profiling.recording import StepRecording


class ProfileCallback(Callback):
    """`Trainer(callbacks=[ProfileCallback("profiled", first=3, last=5)])`; the arguments of `StepRecording`.

    Of several processes the first one records.
    """

    def __init__(self, folder: str | os.PathLike[str], first: int = 3, last: int = 5) -> None:
        self.recording = StepRecording(folder, first, last)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero:
            self.recording.begin(trainer.global_step + 1, pl_module, trainer.optimizers, "training_step")
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._step:  # not a batch whose gradients are only accumulated
            self.recording.end(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.recording.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero:
            self.recording.close()
