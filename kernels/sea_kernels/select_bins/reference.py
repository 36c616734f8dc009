"""PyTorch form of the selection: a threshold per group, found by bisecting on the bit pattern of the scores."""

import torch
from torch import Tensor

from ..bins import Layout, aligned_width, bin_of, wanted_bins
from ..chunks import row_chunks, working_dtype
from ..masks import pack_bits
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
        ranks = _ordered_integers(scores[:, :, rows])
        limits = torch.iinfo(ranks.dtype)
        ranks.masked_fill_(forced[:, None], limits.max).masked_fill_(~exists[:, None], limits.min)
        budget = _budget(part.length, exists, forced, heads, num_bins, k=k, layout=layout, grouping=grouping)
        packed.append(pack_bits(_keep_largest(ranks, budget, grouping)))
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


def _ordered_integers(scores: Tensor) -> Tensor:
    """Integers in the same order as the scores: int64 for float64, int32 otherwise."""
    scores = scores.to(working_dtype(scores.dtype)) + 0.0  # a copy, in which -0.0 has become its equal 0.0
    bits = scores.view(torch.int64 if scores.dtype == torch.float64 else torch.int32)
    limits = torch.iinfo(bits.dtype)
    flip = bits >> (limits.bits - 1)  # all ones for a negative score, whose magnitude counts downwards
    return bits.bitwise_xor_(flip.bitwise_and_(limits.max))


def _keep_largest(ranks: Tensor, budget: Tensor, grouping: str) -> Tensor:
    """bool ``[N, H, T, K]``: the ``budget`` largest of each group, the lowest index first among equals."""
    shape = ranks.shape
    if grouping == "query":
        return _largest(ranks, budget.expand(shape[:3]))
    if grouping == "causal_batch":
        kept = _largest(ranks.transpose(1, 2).flatten(2), budget)
        return kept.unflatten(2, (shape[1], shape[3])).transpose(1, 2).contiguous()
    if grouping == "head":
        return _largest(ranks.flatten(2), budget.expand(shape[:2])).view(shape)
    return _largest(ranks.flatten(1), budget).view(shape)


def _largest(ranks: Tensor, budget: Tensor) -> Tensor:
    """bool like ``ranks [..., C]``: the ``budget [...]`` largest entries, the lowest index first among equals."""
    budget = budget[..., None].int()
    threshold = _kth_largest(ranks, budget)
    above, equal = ranks > threshold, ranks == threshold
    left = budget - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= left))


def _kth_largest(ranks: Tensor, count: Tensor) -> Tensor:
    """Largest integer that at least ``count`` entries of the last dimension reach, found bit by bit from the top."""
    limits = torch.iinfo(ranks.dtype)
    found = torch.full_like(count, limits.min, dtype=ranks.dtype)
    reached = torch.empty_like(ranks, dtype=torch.int32)
    for bit in reversed(range(limits.bits)):
        candidate = torch.zeros_like(found) if bit == limits.bits - 1 else found | (1 << bit)
        torch.ge(ranks, candidate, out=reached)
        enough = reached.sum(-1, keepdim=True, dtype=torch.int32) >= count
        found = torch.where(enough, candidate, found)
    return found
