"""The file that an interrupted search goes on from: everything it has measured."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from e3pruner.storage import write_json

_FORMAT = "e3pruner.search.checkpoint"
_SECONDS = 5.0


class Checkpoint:
    """Measurements of one search at `path`, as JSON; `identity` is what must agree for them to be of use again.

    `measured` and `seconds` are those of `SearchProblem`.

    Loads what is there. Raises `ValueError` naming the file if it is damaged or of another search, and
    `FileNotFoundError` if its folder does not exist.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity))
        self._saved_at = time.monotonic()
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"checkpoint={os.fspath(path)!r}: its folder does not exist")
        self.measured: dict[str, list[float]] = {}
        self.seconds: dict[str, float] = {}
        if self.path.exists():
            self.measured, self.seconds = self._load()

    def save(self) -> None:
        """Replace the file by one that holds what is measured now, whole or not at all."""
        content = {"identity": self.identity, "measured": self.measured, "seconds": self.seconds}
        write_json(self.path, {"format": _FORMAT, **content})
        self._saved_at = time.monotonic()

    def save_if_due(self) -> None:
        """`save`, but not more often than every few seconds."""
        if time.monotonic() - self._saved_at > _SECONDS:
            self.save()

    def _load(self) -> tuple[dict[str, list[float]], dict[str, float]]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            identity = dict(content["identity"])
            measured = {key: [*map(float, values)] for key, values in content["measured"].items()}
            seconds = {key: float(value) for key, value in content["seconds"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"checkpoint={os.fspath(self.path)!r} is damaged ({error!r}); delete it") from error
        other = sorted(key for key in identity | self.identity if identity.get(key) != self.identity.get(key))
        if other:
            raise ValueError(
                f"checkpoint={os.fspath(self.path)!r} is of another search: it differs in {', '.join(other)}; "
                "name another file or delete it"
            )
        return measured, seconds
