"""How good a model is, and how fast."""

from e3pruner.evaluation.evaluate import evaluate
from e3pruner.evaluation.latency import Speeds, latency, speeds
from e3pruner.evaluation.target import layers_to_drop
from e3pruner.evaluation.tasks import evaluate_tasks
from e3pruner.evaluation.text_tasks import write_text_tasks
from e3pruner.evaluation.writing import fastest_writer, writing

__all__ = [
    "Speeds",
    "evaluate",
    "evaluate_tasks",
    "fastest_writer",
    "latency",
    "layers_to_drop",
    "speeds",
    "write_text_tasks",
    "writing",
]
