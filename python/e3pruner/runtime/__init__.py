"""Decode with a mask over a model's own weights."""

from e3pruner.runtime.layer_skip import LayerSkipRuntime

__all__ = ["LayerSkipRuntime"]
