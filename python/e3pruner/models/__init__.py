"""Decoder stacks of Hugging Face models: find them, gate them, skip layers, and cut layers out for good."""

from e3pruner.models.gates import gated, skipped
from e3pruner.models.head import OutputHead, last_hidden, output_head
from e3pruner.models.plan import PruningPlan
from e3pruner.models.runtime import LayerSkipRuntime
from e3pruner.models.stack import find_layers
from e3pruner.models.surgery import prune

__all__ = [
    "LayerSkipRuntime",
    "OutputHead",
    "PruningPlan",
    "find_layers",
    "gated",
    "last_hidden",
    "output_head",
    "prune",
    "skipped",
]
