"""The stages of a long run, each kept when it is done: an interrupted run repeats none."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.precision import weights_in
from e3pruner.storage import new_folder, read_checked, write_checked

T = TypeVar("T")

_stderr = Console(stderr=True, highlight=False, soft_wrap=True)

_KIND, _FORM = "e3pruner.stage", {"value": object, "seconds": float}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_checked(path, _KIND, _FORM)
    except ValueError as error:
        raise ValueError(f"{error}; delete it to repeat the stage, or use --force") from error


@dataclass(frozen=True)
class Stages:
    """Stages of one run in `folder`. Each gives JSON, which is kept there until the run is complete.

    `dtype`: of the weights in the checkpoints of the run, whatever it computes in.
    """

    folder: Path
    dtype: torch.dtype

    def stage(self, name: str, compute: Callable[[], T]) -> T:
        """What `compute` gives: computed the first time, read when the run goes on.

        Raises ValueError naming the file if what was kept is damaged.
        """
        path = self.folder / f"stage-{name}.json"
        if not path.exists():
            _stderr.print(f"[bold]{name}[/]")
            began = time.perf_counter()
            value = compute()
            write_checked(path, _KIND, {"value": value, "seconds": round(time.perf_counter() - began, 1)})
        kept: T = _read(path)["value"]
        return kept

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, in their order. Of a stage that was interrupted: of its last part."""
        files = sorted(self.folder.glob("stage-*.json"), key=lambda path: path.stat().st_mtime_ns)
        return {path.stem.removeprefix("stage-"): _read(path)["seconds"] for path in files}

    def clear(self) -> None:
        """Forgets the stages."""
        for path in self.folder.glob("stage-*.json"):
            path.unlink()

    def export(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        """A checkpoint of the run, whole or not there."""
        with new_folder(self.folder / name, force=True) as folder, weights_in(model.parameters(), self.dtype):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
