"""Calibration, training and held-out text: files, JSON lines, data sets, chats; packed into rows and batches."""

from e3pruner.text.sequences import Packed, Sequences
from e3pruner.text.splits import cut

__all__ = ["Packed", "Sequences", "cut"]
