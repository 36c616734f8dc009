"""Rows that share one estimate (``query_stride``): each group of rows takes the mask of its first row.

The first row of a group sees no later token, so sharing stays causal. What a later row adds by itself is the bin (or
the window) of its own position, which the first row could not know.
"""

import torch
from torch import Tensor

from sea_kernels.bins import bin_of
from sea_kernels.masks import BinMask, RunMask, pack_bits
from sea_kernels.spans import RowSpans


def share_rows(
    mask: BinMask | RunMask, spans: RowSpans, stride: int, *, causal: bool, keep_own: bool
) -> BinMask | RunMask:
    """The mask in which every row uses the selection of the first row of its group of ``stride`` rows.

    Args:
        mask: one selection per row.
        spans: of the same rows; queries and keys must be the same positions (no cache).
        stride: rows per group, counted from each item's first real row.
        causal: whether a row sees only keys up to its own position. A causal run mask then has a window that reaches
            back to where the group's first row ends.
        keep_own: whether every row adds the bin of its own position.
    """
    position = spans.position.clamp_min(0)
    leader = position - position % stride + spans.start[:, None]  # [N, T], a row index
    leader = leader.clamp_max(position.shape[1] - 1)
    if isinstance(mask, RunMask):
        return RunMask(_take_rows(mask.starts, leader), mask.width, mask.window, stride if causal else 1)
    bits = _take_rows(mask.bits, leader)
    if keep_own:
        bits = bits | _own_bin(mask, spans)[:, None]
    return BinMask(bits, mask.num_bins, mask.layout, mask.shift)


def _take_rows(tensor: Tensor, row: Tensor) -> Tensor:
    return tensor.gather(2, row[:, None, :, None].expand_as(tensor))


def _own_bin(mask: BinMask, spans: RowSpans) -> Tensor:
    """int32 ``[N, T, K / 32]`` with the bit of each row's own position set."""
    own = bin_of(spans.position.clamp_min(0), spans.length, mask.num_bins, mask.layout, mask.shift)
    return pack_bits(torch.nn.functional.one_hot(own, mask.num_bins) * (spans.length > 0)[..., None])
