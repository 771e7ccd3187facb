"""How good a model is, and how fast."""

from e3pruner.evaluation.evaluate import evaluate
from e3pruner.evaluation.latency import latency

__all__ = ["evaluate", "latency"]
