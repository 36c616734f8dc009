"""Performer: the linear attention of SEA's estimator as the whole attention (arXiv 2009.14794)."""

import torch
from torch import Tensor

import sea_kernels as ops

from ...config import SEAConfig
from ..features import RandomFeatures
from .base import BaselineAttention


class PerformerAttention(BaselineAttention):
    """Kernel-based linear attention with random features, see :func:`sea_kernels.linear_attention`.

    Knobs: ``feature_ratio``, ``redraw_interval``, ``backend``. Nothing but the random features is held; they are a
    buffer.
    """

    def __init__(self, config: SEAConfig, *, num_heads: int, num_kv_heads: int, head_dim: int, causal: bool) -> None:
        super().__init__(config, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, causal=causal)
        self.features = RandomFeatures(head_dim, config.feature_ratio)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        attention_mask: Tensor | None = None,
        with_scores: bool = True,
    ) -> tuple[Tensor, None]:
        self._refuse_cache(query.shape[2], key.shape[2])
        context = ops.linear_attention(
            query,
            key,
            value,
            self.features.projection,
            causal=self.causal,
            scaling=scaling,
            attention_mask=attention_mask,
            backend=self.config.backend,
        )
        return context.transpose(1, 2), None

    def redraw_projection(self, generator: torch.Generator | None = None) -> None:
        self.features.redraw(generator)
