"""The folder that file surgery writes: whole or not there, with what it takes over from the one that was cut."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from e3pruner.models.files.shards import INDEX
from e3pruner.storage import locked, new_folder, remove_temporaries
from e3pruner.surgery.plan import PLAN_FILE

# Weights in other forms than the one that is cut: they are the dense model's.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".npz", ".tflite"}
# What speaks of the dense model alone, or is written anew.
_REPLACED = {"config.json", "adapter_config.json", "README.md", PLAN_FILE, "e3.yaml", "results.json"}


@contextmanager
def result(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well; nothing is left of one that does not.

    Raises FileExistsError at once if `out` exists, or another process makes it.
    """
    with locked(out):
        remove_temporaries(out.parent, of=out.name)  # of a process that was killed
        with new_folder(out) as temporary:
            yield temporary


def carry_over(folder: Path, out: Path, cut: set[str]) -> None:
    """Copies what else lies in `folder` beside the files `cut`: tokenizers, processors, licences, code."""
    left_out = []

    def unfit(where: str, entries: list[str]) -> set[str]:
        top = Path(where) == folder
        weights = {e for e in entries if Path(e).suffix in _WEIGHTS or e.endswith(".index.json")}
        left_out.extend(sorted(weights - cut - {INDEX}))
        return weights | {e for e in entries if e.startswith(".") or (top and e in _REPLACED)}

    shutil.copytree(folder, out, ignore=unfit, dirs_exist_ok=True)
    if left_out:
        warnings.warn(f"left out, as they hold weights of the dense model: {', '.join(left_out)}", stacklevel=5)


@contextmanager
def bytes_bar(what: str, size: int) -> Iterator[Callable[[int], None]]:
    """A bar for `size` bytes; gives what to tell it how many more are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=size)
        yield lambda count: bar.update(task, advance=count)
