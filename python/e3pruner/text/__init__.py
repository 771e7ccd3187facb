"""Calibration, training and held-out text: files, JSON lines, data sets, chats; packed into rows and batches."""

from e3pruner.text.batches import Packed

__all__ = ["Packed"]
