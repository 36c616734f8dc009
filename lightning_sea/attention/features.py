"""The random projection of the kernel-based linear attention (Performer, arXiv 2009.14794, section 3)."""

import math

import torch
from torch import Tensor, nn


def num_features(head_dim: int, feature_ratio: float) -> int:
    """M = int(D ln(D) / feature_ratio), at least 1."""
    return max(1, int(head_dim * math.log(head_dim) / feature_ratio))


def orthogonal_projection(rows: int, head_dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Float32 ``[rows, head_dim]``: blocks of orthogonal rows, each with the norm of a Gaussian vector.

    Drawn on the CPU, so that one seed gives one projection on every device and every rank.
    """
    blocks = []
    for _ in range(math.ceil(rows / head_dim)):
        gaussian = torch.randn(head_dim, head_dim, generator=generator)
        orthogonal, upper = torch.linalg.qr(gaussian)
        blocks.append((orthogonal * upper.diagonal().sign()).T)
    norms = torch.randn(rows, head_dim, generator=generator).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:rows] * norms


class RandomFeatures(nn.Module):
    """Holds the projection as a buffer, so that it is saved with the model and redrawn in place."""

    def __init__(self, head_dim: int, feature_ratio: float) -> None:
        super().__init__()
        self.register_buffer("projection", orthogonal_projection(num_features(head_dim, feature_ratio), head_dim))

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw a new projection; give every rank the same ``generator`` state."""
        self.projection.copy_(orthogonal_projection(*self.projection.shape, generator=generator))
