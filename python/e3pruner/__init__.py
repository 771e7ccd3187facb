"""Layer pruning of Hugging Face language models: search a layer mask, cut the layers, recover the model."""

import e3pruner.requirements  # noqa: F401 - before what it looks for is imported
from e3pruner.evaluation import evaluate
from e3pruner.mask_search import search
from e3pruner.models import find_layers
from e3pruner.recovery import TeacherCache, cache_teacher, compensate, distill
from e3pruner.runtime import LayerSkipRuntime
from e3pruner.surgery import PruningPlan, prune

__all__ = [
    "LayerSkipRuntime",
    "PruningPlan",
    "TeacherCache",
    "cache_teacher",
    "compensate",
    "distill",
    "evaluate",
    "find_layers",
    "prune",
    "search",
]
