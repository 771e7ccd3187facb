"""Search, prune, recover, judge: whole runs as a Python API, each stage kept when it is done."""

from e3pruner.pipelines.comparison import Comparison
from e3pruner.pipelines.frontier import frontier
from e3pruner.pipelines.matrix import Matrix
from e3pruner.pipelines.pipeline import Pipeline

__all__ = ["Comparison", "Matrix", "Pipeline", "frontier"]
