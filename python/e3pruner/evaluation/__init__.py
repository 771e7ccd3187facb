"""How good a model is, and how fast."""

from e3pruner.evaluation.evaluate import evaluate
from e3pruner.evaluation.latency import latency
from e3pruner.evaluation.target import layers_to_drop
from e3pruner.evaluation.tasks import evaluate_tasks
from e3pruner.evaluation.text_tasks import write_text_tasks
from e3pruner.evaluation.writing import writing

__all__ = ["evaluate", "evaluate_tasks", "latency", "layers_to_drop", "write_text_tasks", "writing"]
