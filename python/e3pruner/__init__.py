"""Layer pruning of Hugging Face language models: search a layer mask, cut the layers, recover the model."""

from e3pruner.models import PruningPlan, find_layers, prune

__all__ = ["PruningPlan", "find_layers", "prune"]
