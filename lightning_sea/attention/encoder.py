"""Encoder of the estimator, shared by all heads (SEA, section 3.1): Z = GELU(LayerNorm(W1 [C ; V]))."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Encoder(nn.Module):
    """Linear attention's result ``[N, H, T, 2D]`` and the rows' own values ``[N, H, T, D]`` to ``[N, H, T, 2D]``."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * head_dim, 2 * head_dim)
        self.norm = nn.LayerNorm(2 * head_dim)

    def forward(self, linear_context: Tensor, value: Tensor) -> Tensor:
        return F.gelu(self.norm(self.linear(torch.cat([linear_context, value], dim=-1))))
