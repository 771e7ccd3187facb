"""Decoder stacks of Hugging Face models: find them and their parts, gate them, skip layers."""

from e3pruner.models.files.smollm2 import load_smollm2
from e3pruner.models.gates import gated, skipped
from e3pruner.models.head import OutputHead, last_hidden, output_head
from e3pruner.models.stack import find_layers

__all__ = ["OutputHead", "find_layers", "gated", "last_hidden", "load_smollm2", "output_head", "skipped"]
