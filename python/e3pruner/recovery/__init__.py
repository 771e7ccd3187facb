"""Recovery: heal a pruned model, first in closed form, then by distillation from its teacher, live or stored."""

from e3pruner.recovery.cache import TeacherCache, cache_teacher
from e3pruner.recovery.compensation import Compensation, compensate
from e3pruner.recovery.distill import distill
from e3pruner.recovery.loop import DistillResult
from e3pruner.recovery.options import DistillOptions
from e3pruner.recovery.teacher import LiveTeacher, Teacher
from e3pruner.text.sequences import Packed

__all__ = [
    "Compensation",
    "DistillOptions",
    "DistillResult",
    "LiveTeacher",
    "Packed",
    "Teacher",
    "TeacherCache",
    "cache_teacher",
    "compensate",
    "distill",
]
