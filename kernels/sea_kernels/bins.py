"""Bins: how the K columns of an estimated row stretch to its keys. Integers only, so that every backend agrees.

Two layouts, both contiguous runs of keys counted from the row's first valid key:

- ``relative`` (the paper's): K bins of about L / K keys each, so edges move with the row's own length L.
- ``aligned``: bins of w = 2^l keys at multiples of w, with the smallest w for which K bins hold all L keys.
  Neighbouring rows share bins, and pooled keys can be shared with them.

``shift`` (relative only) moves every inner edge by ``shift / 256`` of a key: the edge jitter of training.
"""

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["relative", "aligned"]
LAYOUTS = ("relative", "aligned")
SHIFT_UNIT = 256  # a shift is counted in 1/256 of a key


def aligned_width(length: Tensor, num_bins: int) -> Tensor:
    """Keys per aligned bin, shaped as ``length``: the smallest power of two w with ``num_bins * w >= length``."""
    needed = (length.clamp_min(1) + num_bins - 1) // num_bins
    width = torch.ones_like(needed)
    for exponent in range(1, 40):
        width = torch.where(needed > 2 ** (exponent - 1), 2**exponent, width)
    return width


def bin_start(index: Tensor, length: Tensor, num_bins: int, layout: Layout, shift: int = 0) -> Tensor:
    """First key of bin ``index`` (0 … K; K gives the end) in a row of ``length`` keys (SEA's lo(b)). Broadcasts."""
    if layout == "aligned":
        return torch.minimum(index * aligned_width(length, num_bins), length)
    inner = (2 * SHIFT_UNIT * length * index + SHIFT_UNIT * num_bins + 2 * num_bins * shift) // (
        2 * SHIFT_UNIT * num_bins
    )
    inner = torch.minimum(inner.clamp_min(0), length)
    return torch.where(index <= 0, 0, torch.where(index >= num_bins, length, inner))


def bin_of(key: Tensor, length: Tensor, num_bins: int, layout: Layout, shift: int = 0) -> Tensor:
    """Bin of ``key`` (0-based within the row's valid keys, < ``length``), in 0 … K-1. Broadcasts."""
    if layout == "aligned":
        return torch.div(key, aligned_width(length, num_bins), rounding_mode="floor").clamp(0, num_bins - 1)
    numerator = num_bins * (SHIFT_UNIT * (2 * key + 1) - 2 * shift) - 1
    found = torch.div(numerator, 2 * SHIFT_UNIT * length.clamp_min(1), rounding_mode="floor")
    return found.clamp(0, num_bins - 1)


def bin_sizes(length: Tensor, num_bins: int, layout: Layout, shift: int = 0) -> Tensor:
    """Keys in each bin: ``length.shape + [K]``."""
    edges = bin_start(torch.arange(num_bins + 1, device=length.device), length[..., None], num_bins, layout, shift)
    return edges.diff(dim=-1)


def wanted_bins(k: int, heads: int | Tensor, length: Tensor, num_bins: int, layout: Layout) -> Tensor:
    """Bins that ``heads`` rows of ``length`` keys keep together so that each keeps ``k`` keys on average.

    Rounded half up, not yet limited to what exists: round(heads * k * K / L) for relative bins,
    round(heads * k / w) for aligned ones. Same shape as ``length``.
    """
    if layout == "aligned":
        width = aligned_width(length, num_bins)
        return (2 * heads * k + width) // (2 * width)
    length = length.clamp_min(1)
    return (2 * heads * k * num_bins + length) // (2 * length)
