"""What a search has measured: in memory, or in the file that an interrupted search goes on from."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from e3pruner.storage import read_checked, write_checked

_KIND = "e3pruner.search.checkpoint 2"
_FORM = {"identity": {str: object}, "measured": {str: [float]}, "seconds": {str: float}}
_SECONDS = 5.0


class Measurements:
    """`measured`: means over the tokens of a batch, by key; `seconds`: how long each took, and each dense pass.

    `teacher`: the dense model's last hidden state (N, H) of the batches that have been seen, by number. Problems on the
    same calibration text and model may share one of these.
    """

    def __init__(self, measured: dict[str, list[float]] | None = None, seconds: dict[str, float] | None = None) -> None:
        self.measured = measured or {}
        self.seconds = seconds or {}
        self.teacher: dict[int, Tensor] = {}

    def add(self, found: dict[str, list[float]], seconds: dict[str, float]) -> None:
        """Keep what was found."""
        self.measured |= found
        self.seconds |= seconds


class Checkpoint(Measurements):
    """Measurements in a JSON file at `path`; `identity` is what must agree for them to be of use again.

    Loads what is there. Raises `ValueError` naming the file if it is damaged or of another search, and
    `FileNotFoundError` if its folder does not exist.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity))
        self._saved_at = time.monotonic()
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"checkpoint={os.fspath(path)!r}: its folder does not exist")
        super().__init__(*(self._load() if self.path.exists() else ()))

    def add(self, found: dict[str, list[float]], seconds: dict[str, float]) -> None:
        """Keep what was found, in the file too unless it was written a few seconds ago."""
        super().add(found, seconds)
        if time.monotonic() - self._saved_at > _SECONDS:
            self.save()

    def save(self) -> None:
        """Replace the file by one that holds what is measured now, whole or not at all."""
        content = {"identity": self.identity, "measured": self.measured, "seconds": self.seconds}
        write_checked(self.path, _KIND, content)
        self._saved_at = time.monotonic()

    def _load(self) -> tuple[dict[str, list[float]], dict[str, float]]:
        try:
            content = read_checked(self.path, _KIND, _FORM)
        except ValueError as error:
            raise ValueError(f"checkpoint={os.fspath(self.path)!r} is damaged ({error}); delete it") from error
        identity, measured, seconds = (content[key] for key in _FORM)
        other = sorted(key for key in identity | self.identity if identity.get(key) != self.identity.get(key))
        if other:
            raise ValueError(
                f"checkpoint={os.fspath(self.path)!r} is of another search: it differs in {', '.join(other)}; "
                "name another file or delete it"
            )
        return measured, seconds
