"""The curves of a run while it goes on, in the programs that people watch runs with: by accelerate's trackers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "e3pruner"
TRACKED = "tensorboard"  # its folder beside a result


def check_tracker(name: str | None) -> None:
    """Raises ValueError for a name that is none of `TRACKERS`, ModuleNotFoundError if its package is not installed."""
    if name is None:
        return
    if name not in TRACKERS:
        raise ValueError(f"track={name!r} must be one of {', '.join(TRACKERS)}")
    if name not in map(str, get_available_trackers()):
        raise ModuleNotFoundError(f"track={name!r} needs the package {name}, which is not installed", name=name)


@contextmanager
def opened_tracker(name: str | None, folder: str | Path | None, run: str, first: int) -> Iterator[GeneralTracker]:
    """The tracker `name` (None: one that does nothing) of a run whose next step is `first`.

    It goes on with what it has of that run: TensorBoard by the `folder`, in which steps from `first` on, logged before
    a kill, are declared void; the others by the identity `run`.
    """
    if name is None:
        yield GeneralTracker(_blank=True)
        return
    PartialState()  # accelerate's trackers ask it which process they are in
    continued: dict[str, dict[str, Any]] = {
        "tensorboard": {"logging_dir": folder, "purge_step": first},
        "wandb": {"id": run, "resume": "allow"},
        "trackio": {"name": run, "resume": "allow"},
    }
    tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, **continued[name])
    tracker.start()
    try:
        yield tracker
    finally:
        tracker.finish()
