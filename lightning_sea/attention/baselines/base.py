"""What the baselines share: the constructor and the calls that the rest of the package makes on every method."""

import torch
from torch import Tensor, nn

from ...config import SEAConfig


class BaselineAttention(nn.Module):
    """Stands in for softmax attention as ``SEAAttention`` does, with the same arguments, but estimates nothing.

    Args:
        config: of which each method reads the knobs that are its own.
        num_heads: query heads H.
        num_kv_heads: key and value heads G, a divisor of H.
        head_dim: D.
        causal: whether a row sees only keys up to its own position.
    """

    def __init__(self, config: SEAConfig, *, num_heads: int, num_kv_heads: int, head_dim: int, causal: bool) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.num_kv_heads, self.head_dim, self.causal = num_heads, num_kv_heads, head_dim, causal

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
        """Attend.

        Args:
            query: ``[N, H, T, D]`` as the host hands it to attention: positions already rotated in.
            key, value: ``[N, G, S, D]``; the queries are the last T of the S positions.
            scaling: the host's score factor.
            attention_mask: bool or integer ``[N, S]``, nonzero at real tokens (contiguous), or None.
            with_scores: of no effect, there are none.

        Returns:
            The context ``[N, T, H, D]`` in query's dtype, zero in padding rows, and None in place of an estimate.

        Raises:
            ValueError: if shapes do not fit, or if the method needs S = T.
        """
        raise NotImplementedError

    def redraw_projection(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features, if the method has any; the same ``generator`` state on every rank."""

    def _refuse_cache(self, num_queries: int, num_keys: int) -> None:
        if num_queries != num_keys:
            raise ValueError(
                f"{num_queries} queries with {num_keys} keys: method={self.config.method!r} reads whole inputs and "
                "keeps no running sums beside a key-value cache; pass use_cache=False"
            )
