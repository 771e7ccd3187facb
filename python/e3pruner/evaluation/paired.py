"""Two models on the same sequences: the mean difference, and how far chance alone would move it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Paired(NamedTuple):
    """The mean of a difference, and its standard error, which of a single pair is not known."""

    mean: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


def paired(these: Mapping[str, Sequence[float]], those: Mapping[str, Sequence[float]]) -> Paired:
    """These less those, by kind of text one value for each sequence, of the same sequences in the same order.

    The mean over kinds of the mean over sequences: each kind counts as much. The error is that of drawing other
    sequences of the same kinds. Raises ValueError where kinds or numbers of sequences differ.
    """
    if these.keys() != those.keys() or not these:
        raise ValueError(f"paired: {sorted(these)} and {sorted(those)} must be the same kinds of text, at least one")
    found = []
    for kind in these:
        if len(these[kind]) != len(those[kind]) or not these[kind]:
            raise ValueError(f"paired: {len(these[kind])} and {len(those[kind])} sequences of {kind!r} make no pairs")
        differences = [a - b for a, b in zip(these[kind], those[kind], strict=True)]
        spread = statistics.stdev(differences) if len(differences) > 1 else math.nan
        found.append((statistics.fmean(differences), spread / math.sqrt(len(differences))))
    means, errors = zip(*found, strict=True)
    error = math.hypot(*errors) / len(errors)
    return Paired(statistics.fmean(means), None if math.isnan(error) else error)
