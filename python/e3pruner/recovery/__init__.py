"""Recovery: heal a pruned model by distillation from its teacher."""

from e3pruner.recovery.distill import distill
from e3pruner.recovery.loop import DistillResult
from e3pruner.recovery.options import DistillOptions
from e3pruner.recovery.teacher import LiveTeacher, Teacher

__all__ = ["DistillOptions", "DistillResult", "LiveTeacher", "Teacher", "distill"]
