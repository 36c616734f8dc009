"""Operations of SEA attention, one folder each: a PyTorch reference and, where it exists, a Triton form behind one name."""

from .linear_attention import LinearState, linear_attention
from .sparse_attention import sparse_attention

__all__ = ["LinearState", "linear_attention", "sparse_attention"]
