"""PyTorch form of the second look: scores of all runs, a chunk of rows at a time, of which the candidates compete.

Memory is linear in T. Scoring every run and not only the candidates makes one matrix product of it, but its time grows
with T * S / width.
"""

import torch
from torch import Tensor

from ..bins import bin_of
from ..chunks import row_chunks, without_autocast
from ..masks import BinMask, unpack_bits
from ..pooling import pool_once, query_features
from ..ranking import keep_largest, ordered_integers
from ..spans import RowSpans


@torch.no_grad()
def second_look(
    query: Tensor,
    key: Tensor,
    coarse: BinMask,
    spans: RowSpans,
    *,
    capacity: int,
    width: int,
    window: int,
    causal: bool,
    scaling: float,
    mean_weight: Tensor,
    bound_weight: Tensor | None,
    keep_first: bool,
) -> Tensor:
    """See :func:`sea_kernels.second_look`; returns the starts of ``capacity`` runs per row."""
    batch, heads, num_queries, _ = query.shape
    num_runs = -(-key.shape[2] // width)
    weights = {"mean": mean_weight} | ({} if bound_weight is None else {"bound": bound_weight})
    pooled = {statistic: _pooled_runs(key, spans, statistic, width, num_runs) for statistic in weights}
    starts = []
    for rows in row_chunks(num_queries, 4 * batch * heads * num_runs):
        part = RowSpans(spans.start, spans.length[:, rows], spans.position[:, rows])
        with without_autocast(query):
            scores = sum(
                weight.to(pooled[statistic].dtype)[:, None, None]
                * _products(query_features(query[:, :, rows], scaling, statistic), pooled[statistic])
                for statistic, weight in weights.items()
            )
        kept_before = unpack_bits(coarse.bits[:, :, rows], coarse.num_bins)
        competing = _overlaps(kept_before, part.length, width, num_runs)
        kept = _best_runs(scores, competing, part, capacity, width, window, causal, keep_first)
        starts.append(_starts(kept, capacity, width))
    return torch.cat(starts, 2)


def _pooled_runs(key: Tensor, spans: RowSpans, statistic: str, width: int, num_runs: int) -> Tensor:
    """Pooled keys ``[N, G, C, F]`` of all runs of an item, counted from its first real key."""
    num_keys = key.shape[2]
    real_end = spans.start + spans.length.amax(-1)  # a bidirectional item's last run may be cut short
    start = spans.start[:, None] + torch.arange(num_runs, device=key.device) * width
    end = torch.minimum(start + width, real_end[:, None])
    start = start.clamp_max(num_keys - 1)
    end = torch.maximum(end, start + 1)  # runs that hold no real key are never candidates
    (pooled,) = pool_once(key, statistic, [(start[:, None], end[:, None])], width)
    return pooled.squeeze(2)


def _products(features: Tensor, pooled: Tensor) -> Tensor:
    grouped = features.unflatten(1, (pooled.shape[1], -1)).flatten(2, 3)
    return (grouped @ pooled.mT).view(*features.shape[:3], -1)


def _overlaps(kept: Tensor, length: Tensor, width: int, num_runs: int) -> Tensor:
    """bool ``[N, H, R, C]``: runs that share a key with a kept bin of ``kept [N, H, R, K]``."""
    num_bins = kept.shape[-1]
    first = torch.arange(num_runs, device=kept.device) * width
    last_key = (length - 1).clamp_min(0)[..., None]
    first_bin = bin_of(first.minimum(last_key), length[..., None], num_bins, "aligned")
    last_bin = bin_of((first + width - 1).minimum(last_key), length[..., None], num_bins, "aligned")
    before = torch.nn.functional.pad(kept.cumsum(-1, dtype=torch.int32), (1, 0))  # kept bins before each bin

    def at(index: Tensor) -> Tensor:
        return before.gather(-1, index[:, None].expand(-1, kept.shape[1], -1, -1))

    return (at(last_bin + 1) > at(first_bin)) & (first < length[..., None])[:, None]


def _best_runs(
    scores: Tensor,
    competing: Tensor,
    spans: RowSpans,
    capacity: int,
    width: int,
    window: int,
    causal: bool,
    keep_first: bool,
) -> Tensor:
    """bool ``[N, H, R, C]``: the runs that each row keeps, at most ``capacity`` of them."""
    run = torch.arange(scores.shape[-1], device=scores.device)
    own = torch.div(spans.position, width, rounding_mode="floor")[..., None]
    exists = run * width < spans.length[..., None]
    if causal:  # the own run, incomplete as it may be, has no score: the window or the line below keeps it
        exists &= run < own - window // width if window else run <= own
    ranks = ordered_integers(scores)
    limits = torch.iinfo(ranks.dtype)
    ranks.masked_fill_(~(competing & exists[:, None]), limits.min)
    if keep_first:
        ranks.masked_fill_((exists & (run == 0))[:, None], limits.max - 1)
    if causal and not window:
        ranks.masked_fill_((exists & (run == own))[:, None], limits.max)
    budget = (ranks > limits.min).sum(-1).clamp_max(capacity)
    return keep_largest(ranks, budget)


def _starts(kept: Tensor, capacity: int, width: int) -> Tensor:
    """int32 ``[N, H, R, capacity]``: starts of the kept runs, ascending, -1 where there is none."""
    slot = torch.where(kept, kept.cumsum(-1) - 1, capacity)
    start = (torch.arange(kept.shape[-1], dtype=torch.int32, device=kept.device) * width).expand_as(slot)
    starts = start.new_full((*kept.shape[:-1], capacity + 1), -1)
    return starts.scatter_(-1, slot, start)[..., :capacity].contiguous()
