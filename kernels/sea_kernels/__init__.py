"""Operations of SEA attention, one folder each: a PyTorch form and, where it exists, a Triton form."""

from .distillation import TeacherStatistics, attention_loss, estimation_loss, kept_mass, reduce_rows, teacher_statistics
from .linear_attention import LinearState, linear_attention
from .pooled_scores import pooled_scores
from .select_bins import select_bins
from .sparse_attention import sparse_attention

__all__ = [
    "LinearState",
    "TeacherStatistics",
    "attention_loss",
    "estimation_loss",
    "kept_mass",
    "linear_attention",
    "pooled_scores",
    "reduce_rows",
    "select_bins",
    "sparse_attention",
    "teacher_statistics",
]
