"""The two gates s_prob and s_mix of a row (SEA, section 3.3), in (0, 1)."""

import torch
from torch import Tensor, nn


class EncodedGates(nn.Module):
    """From the encoder's output, one linear map for all heads (the paper's form)."""

    def __init__(self, head_dim: int, num_gates: int, bias: float) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * head_dim, num_gates)
        nn.init.constant_(self.linear.bias, bias)

    def forward(self, encoded: Tensor) -> Tensor:
        """``[N, H, T, 2D]`` to float32 ``[num_gates, N, H, T]``."""
        return self.linear(encoded).float().sigmoid().movedim(-1, 0)


class QueryGates(nn.Module):
    """From the query, one linear map per head: for estimators without an encoder. Starts constant."""

    def __init__(self, num_heads: int, head_dim: int, num_gates: int, bias: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_gates, num_heads, head_dim))
        self.bias = nn.Parameter(torch.full((num_gates, num_heads), float(bias)))

    def forward(self, query: Tensor) -> Tensor:
        """``[N, H, T, D]`` to float32 ``[num_gates, N, H, T]``."""
        logits = torch.einsum("nhtd,ghd->gnht", query, self.weight.to(query.dtype)).float()
        return (logits + self.bias.float()[:, None, :, None]).sigmoid()
