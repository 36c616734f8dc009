"""Operations of SEA attention, one folder each: a PyTorch form and, where it exists, a Triton form."""

from .linear_attention import LinearState, linear_attention
from .pooled_scores import pooled_scores
from .select_bins import select_bins
from .sparse_attention import sparse_attention

__all__ = ["LinearState", "linear_attention", "pooled_scores", "select_bins", "sparse_attention"]
