"""The value that tells the estimator where attention mass went: E of V+ = [E ; V] (SEA, section 3.1)."""

import math

import torch
from torch import Tensor, nn

from sea_kernels.spans import RowSpans


def stretched_identity(num_keys: int, head_dim: int, spans: RowSpans, real: Tensor) -> Tensor:
    """The D x D identity stretched over each item's real tokens, corners aligned (bidirectional form).

    Args:
        num_keys: S.
        head_dim: D.
        spans: for the items' first real key.
        real: int64 ``[N]``, number of real keys.

    Returns:
        float32 ``[N, S, D]``; row j samples the identity at row j / (L - 1) * (D - 1); zero at padding.
    """
    key = torch.arange(num_keys, device=real.device) - spans.start[:, None]
    place = key / (real - 1).clamp_min(1)[:, None] * (head_dim - 1)
    column = torch.arange(head_dim, device=real.device)
    weight = (1 - (place[..., None] - column).abs()).clamp_min(0)
    inside = (key >= 0) & (key < real[:, None])
    return weight * inside[..., None]


class SinusoidPositions(nn.Module):
    """Sinusoids of the absolute position through a learned linear map (causal form).

    The reference learns a table, which ends at its trained length. Sinusoids do not end; with the chosen start the
    result has unit variance at every position, as the table's N(0, 1) has.
    """

    def __init__(self, head_dim: int, period: float) -> None:
        super().__init__()
        self.period = period
        self.num_waves = math.ceil(head_dim / 2)
        self.weight = nn.Parameter(torch.randn(2 * self.num_waves, head_dim) / math.sqrt(self.num_waves))

    def forward(self, num_keys: int, start: Tensor) -> Tensor:
        """Float32 ``[N, S, D]`` for positions counted from each item's first real key ``start [N]``."""
        key = torch.arange(num_keys, device=start.device) - start[:, None]
        exponent = torch.arange(self.num_waves, device=start.device) / self.num_waves
        angle = key[..., None].float() / self.period**exponent
        return torch.cat([angle.sin(), angle.cos()], dim=-1) @ self.weight.float()
