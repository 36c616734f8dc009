"""Operations of SEA attention, one folder each: a PyTorch form and, where it exists, a Triton form."""

from .distillation import TeacherStatistics, attention_loss, estimation_loss, kept_mass, state_loss, teacher_statistics
from .export import count_keys, to_dense, to_flat_csr
from .far_field import count_pooled, far_field_attention
from .linear_attention import LinearState, linear_attention
from .masks import HeadKeys
from .mix_average import mix_average
from .pooled_scores import pooled_scores, weighted_scores
from .pooled_selection import pooled_selection
from .second_look import second_look
from .select_bins import select_bins
from .sparse_attention import sparse_attention

__all__ = [
    "HeadKeys",
    "LinearState",
    "TeacherStatistics",
    "attention_loss",
    "count_keys",
    "count_pooled",
    "estimation_loss",
    "far_field_attention",
    "kept_mass",
    "linear_attention",
    "mix_average",
    "pooled_scores",
    "pooled_selection",
    "second_look",
    "select_bins",
    "sparse_attention",
    "state_loss",
    "teacher_statistics",
    "to_dense",
    "to_flat_csr",
    "weighted_scores",
]
