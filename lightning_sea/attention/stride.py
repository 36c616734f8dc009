"""Rows that share one estimate (``query_stride``): each group of rows keeps the bins of its first row.

The first row of a group sees no later token, so sharing stays causal. What it could not know, the bins from its own
position to a later row's, that row adds by itself.
"""

import dataclasses

import torch

from sea_kernels.bins import bin_of
from sea_kernels.masks import BinMask, group_leaders, pack_bits, take_rows
from sea_kernels.spans import RowSpans


def share_rows(mask: BinMask, spans: RowSpans, stride: int, *, keep_own: bool) -> BinMask:
    """The mask in which every row uses the bins of the first row of its group of ``stride`` positions.

    Args:
        mask: one selection per row.
        spans: of the same rows; causal, queries and keys the same positions.
        stride: rows per group, counted from each item's first real row.
        keep_own: whether every row adds the bins from the group's first position to its own.
    """
    bits = take_rows(mask.bits, group_leaders(spans, stride))
    if keep_own:
        position, length = spans.position.clamp_min(0), spans.length
        ends = [
            bin_of(place, length, mask.num_bins, mask.layout, mask.shift)[..., None]
            for place in (position - position % stride, position)
        ]
        index = torch.arange(mask.num_bins, device=bits.device)
        near = (index >= ends[0]) & (index <= ends[1]) & (length > 0)[..., None]
        bits = bits | pack_bits(near)[:, None]
    return dataclasses.replace(mask, bits=bits)
