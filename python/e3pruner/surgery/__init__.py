"""Cut layers out of a model for good: the plan, the configuration, the weights, in memory or on disk, and the proof."""

from e3pruner.surgery.cut import prune
from e3pruner.surgery.plan import PruningPlan

__all__ = ["PruningPlan", "prune"]
