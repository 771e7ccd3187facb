"""Cut layers out of a model for good: the plan, the configuration, the weights, and the proof."""

from e3pruner.surgery.in_memory import prune
from e3pruner.surgery.plan import PruningPlan

__all__ = ["PruningPlan", "prune"]
