"""Where time and memory go: named ranges, and a profile of any block of code that any trainer can be."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from e3kernels.compat import profiler_is_on
from e3kernels.profiling.memory import MemoryTimeline
from e3kernels.profiling.ranges import Range, RangeRecorder, named_range
from e3kernels.profiling.timeline import Timeline
from e3kernels.profiling.trace import Trace

__all__ = [
    "TRACE_FILE",
    "MemoryTimeline",
    "Profile",
    "Range",
    "RangeRecorder",
    "Timeline",
    "Trace",
    "named_range",
    "profile",
]

TRACE_FILE = "trace.json"
RANGES_FILE = "ranges.jsonl"


@dataclass
class Profile:
    """What a `profile` block recorded; filled when the block ends."""

    trace: Trace = field(default_factory=lambda: Trace([], [], []))
    memory: MemoryTimeline = field(default_factory=lambda: MemoryTimeline([], {}))

    def seconds(self) -> dict[tuple[str, ...], float]:
        """Time in every range, by its path of names, outermost first, without the ranges inside it."""
        return Timeline(self.trace.phases()).seconds()


@contextmanager
def profile(folder: str | os.PathLike[str] | None = None, *, force: bool = False) -> Iterator[Profile]:
    """Profile the `with` block: operators with their shapes, allocations, and the named ranges of kernels, runtime and
    trainers.

    With `folder`, a Chrome trace (`trace.json`, for chrome://tracing or Perfetto) and one JSON line a range path
    (`ranges.jsonl`: "path", "seconds") are written there, also when the block raises; until then nothing is.

    The profiler adds some microseconds to every operator: below a tenth of a millisecond an operator looks slower than
    it is. Raises, before the block runs, RuntimeError where a profiler is at work already, torch's own included, and
    FileExistsError where `folder` is a file, or holds a profile that is not to be replaced (`force`).
    """
    target = None if folder is None else Path(folder)
    if target is not None:
        check_free(target, force=force)
    if profiler_is_on():
        raise RuntimeError("a profiler is at work already (this one's or torch.profiler): end it first, one at a time")
    activities = [ProfilerActivity.CPU]
    if torch.accelerator.is_available():
        activities.append(getattr(ProfilerActivity, torch.accelerator.current_accelerator(True).type.upper()))  # type: ignore[union-attr]
    result = Profile()
    recording = torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True)
    recording.start()
    try:
        yield result
    finally:
        recording.stop()
        if target is not None:
            target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target) as temporary:
            exported = Path(temporary) / TRACE_FILE
            recording.export_chrome_trace(str(exported))
            result.trace = Trace.read(exported)
            result.memory = MemoryTimeline.of(result.trace)
            if target is not None:
                lines = Path(temporary) / RANGES_FILE
                rows = ({"path": path, "seconds": seconds} for path, seconds in result.seconds().items())
                lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                exported.replace(target / TRACE_FILE)
                lines.replace(target / RANGES_FILE)


def check_free(folder: Path, *, force: bool = False) -> None:
    """Raises FileExistsError where no profile can be written to `folder`: it, or what it is to lie in, is a file, or it
    holds a profile and `force` is not set.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise FileExistsError(f"folder={folder}: {nearest} is a file; name a folder")
    if (folder / TRACE_FILE).exists() and not force:
        raise FileExistsError(f"folder={folder} holds a profile; name another, or replace it with force=True")
