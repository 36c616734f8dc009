"""PyTorch form of the selection: candidates and budget of every group, then its largest scores."""

import torch
from torch import Tensor

from ..bins import Layout, aligned_width, bin_of, wanted_bins
from ..chunks import row_chunks
from ..masks import pack_bits
from ..ranking import keep_largest, ordered_integers
from ..spans import RowSpans


def select_bins(
    scores: Tensor,
    spans: RowSpans,
    *,
    k: int,
    layout: Layout,
    grouping: str,
    keep_first: bool,
    keep_own: bool,
    shift: int,
) -> Tensor:
    """See :func:`sea_kernels.select_bins`; returns the packed bits."""
    batch, heads, num_queries, num_bins = scores.shape
    whole_rows = grouping in ("query", "causal_batch")
    chunks = row_chunks(num_queries, batch * heads * num_bins) if whole_rows else [slice(0, num_queries)]
    packed = []
    for rows in chunks:
        part = RowSpans(spans.start, spans.length[:, rows], spans.position[:, rows])
        exists, forced = _candidates(part, num_bins, layout, keep_first, keep_own, shift)
        ranks = ordered_integers(scores[:, :, rows])
        limits = torch.iinfo(ranks.dtype)
        ranks.masked_fill_(forced[:, None], limits.max).masked_fill_(~exists[:, None], limits.min)
        budget = _budget(part.length, exists, forced, heads, num_bins, k=k, layout=layout, grouping=grouping)
        packed.append(pack_bits(_keep_in_groups(ranks, budget, grouping)))
    return torch.cat(packed, 2)


def _candidates(
    spans: RowSpans, num_bins: int, layout: Layout, keep_first: bool, keep_own: bool, shift: int
) -> tuple[Tensor, Tensor]:
    """Which bins exist and which are always kept, both bool ``[N, T, K]``."""
    length = spans.length
    index = torch.arange(num_bins, device=length.device)
    used = (length + aligned_width(length, num_bins) - 1) // aligned_width(length, num_bins)
    count = used if layout == "aligned" else torch.where(length > 0, num_bins, 0)
    exists = index < count[..., None]
    forced = torch.zeros_like(exists)
    if keep_first:
        forced |= index == bin_of(torch.zeros_like(length), length, num_bins, layout, shift)[..., None]
    if keep_own:
        forced |= index == bin_of(spans.position, length, num_bins, layout, shift)[..., None]
    return exists, forced & exists


def _budget(
    length: Tensor,
    exists: Tensor,
    forced: Tensor,
    heads: int,
    num_bins: int,
    *,
    k: int,
    layout: Layout,
    grouping: str,
) -> Tensor:
    """Bins that each group keeps: ``[N, 1, T]`` query, ``[N, T]`` causal_batch, ``[N, 1]`` head, ``[N]`` batch."""
    heads = heads if grouping in ("batch", "causal_batch") else 1
    most, least, members = heads * exists.sum(-1), heads * forced.sum(-1), heads
    if grouping in ("head", "batch"):  # bidirectional: all real rows of an item have the same length
        most, least = most.sum(-1), least.sum(-1)
        members, length = heads * (length > 0).sum(-1), length.amax(-1)
    budget = wanted_bins(k, members, length, num_bins, layout).maximum(least.clamp_min(1)).minimum(most)
    return budget[:, None] if grouping in ("query", "head") else budget


def _keep_in_groups(ranks: Tensor, budget: Tensor, grouping: str) -> Tensor:
    """bool ``[N, H, T, K]``: the ``budget`` largest of each group, the lowest index first among equals."""
    shape = ranks.shape
    if grouping == "query":
        return keep_largest(ranks, budget.expand(shape[:3]))
    if grouping == "causal_batch":
        kept = keep_largest(ranks.transpose(1, 2).flatten(2), budget)
        return kept.unflatten(2, (shape[1], shape[3])).transpose(1, 2).contiguous()
    if grouping == "head":
        return keep_largest(ranks.flatten(2), budget.expand(shape[:2])).view(shape)
    return keep_largest(ranks.flatten(1), budget).view(shape)
