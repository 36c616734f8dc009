"""PyTorch forms of the pooled-key scores, one for each way in which rows share their bins."""

import itertools

import torch
from torch import Tensor

from ..bins import SHIFT_UNIT, Layout, aligned_width, bin_start
from ..chunks import row_chunks, run_chunk, without_autocast
from ..pooling import RunPool, pool_once, query_features
from ..spans import RowSpans


def pooled_scores(
    query: Tensor,
    key: Tensor,
    spans: RowSpans,
    *,
    num_bins: int,
    layout: Layout,
    causal: bool,
    scaling: float,
    statistic: str,
    shift: int,
    padded: bool,
) -> Tensor:
    """See :func:`sea_kernels.pooled_scores`; ``padded`` says whether ``spans`` come from a mask."""
    options = {"num_bins": num_bins, "scaling": scaling, "statistic": statistic}
    if not causal:
        scores = bidirectional(query, key, spans, layout=layout, shift=shift, **options)
    elif layout == "relative":
        scores = causal_relative(query, key, spans, shift=shift, **options)
    else:
        scores = causal_aligned(query, key, spans, padded=padded, **options)
    return scores.to(query.dtype)


def bidirectional(
    query: Tensor,
    key: Tensor,
    spans: RowSpans,
    *,
    num_bins: int,
    layout: Layout,
    scaling: float,
    statistic: str,
    shift: int,
) -> Tensor:
    """All rows of an item share its bins: pool once."""
    length = spans.length.amax(-1, keepdim=True)  # [N, 1]
    start, end = _pooled_runs(length, num_bins, layout, shift)
    run = _absolute(start, end, spans, key.shape[2])
    with without_autocast(query):
        (pooled,) = pool_once(key, statistic, [run], _longest_run(key.shape[2], num_bins, shift))
        scores = _products(query_features(query, scaling, statistic), pooled.squeeze(2))
    return _without_padding(scores, spans)


def causal_relative(
    query: Tensor,
    key: Tensor,
    spans: RowSpans,
    *,
    num_bins: int,
    scaling: float,
    statistic: str,
    shift: int,
) -> Tensor:
    """Every row has bins of its own: chunks of rows, so that no pooled keys of all rows live at once."""
    batch, groups, num_keys, width = key.shape
    pool = RunPool(key, statistic, _longest_run(num_keys, num_bins, shift))

    def score(rows: slice) -> Tensor:
        start, end = _pooled_runs(spans.length[:, rows], num_bins, "relative", shift)
        pooled = pool.pool(*_absolute(start, end, spans, num_keys))  # [N, G, R, K, F]
        features = query_features(query[:, :, rows], scaling, statistic).unflatten(1, (groups, -1)).transpose(2, 3)
        return (features @ pooled.mT).transpose(2, 3).flatten(1, 2)

    # Small chunks, in cache: the gathered sums are float64, twice, and are read only once.
    chunks = row_chunks(query.shape[2], 8 * batch * groups * num_bins * width)
    with without_autocast(query):
        scores = [run_chunk(score, rows, recompute=len(chunks) > 1) for rows in chunks]
    return _without_padding(torch.cat(scores, 2), spans)


def causal_aligned(
    query: Tensor,
    key: Tensor,
    spans: RowSpans,
    *,
    num_bins: int,
    scaling: float,
    statistic: str,
    padded: bool,
) -> Tensor:
    """Rows with one bin width share their complete bins; only a row's own bin is pooled for it alone."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    position = spans.position.clamp_min(0)
    width = aligned_width(position + 1, num_bins)
    own = position // width
    index = torch.arange(num_bins, device=key.device)
    stretches = _equal_width_rows(width if padded else _unpadded_widths(num_queries, num_keys, num_bins))
    runs = [_absolute((own * width)[..., None], (position + 1)[..., None], spans, num_keys)]
    for rows in stretches:
        step = width[:, rows.start, None, None]
        runs.append(_absolute(index * step, (index + 1) * step, spans, num_keys))
    features = query_features(query, scaling, statistic)
    with without_autocast(query):
        own_keys, *pooled_keys = pool_once(key, statistic, runs, _longest_run(num_keys, num_bins))
        own_score = _own_products(features, own_keys.squeeze(3))
        scores = []
        for rows, pooled in zip(stretches, pooled_keys, strict=True):
            complete = (index < own[:, rows, None])[:, None]
            products = _products(features[:, :, rows], pooled.squeeze(2))
            scores.append(torch.where(complete, products, own_score[:, :, rows]))
    return _without_padding(torch.cat(scores, 2), spans)


def _pooled_runs(length: Tensor, num_bins: int, layout: Layout, shift: int) -> tuple[Tensor, Tensor]:
    """Start and end of the keys that stand for each bin, ``length.shape + [K]``; never empty where length > 0."""
    index, length = torch.arange(num_bins, device=length.device), length[..., None]
    if layout == "aligned":
        width = aligned_width(length, num_bins)
        start = torch.minimum(index, (length - 1).clamp_min(0) // width) * width
        return start, torch.minimum(start + width, length)
    edges = bin_start(torch.arange(num_bins + 1, device=length.device), length, num_bins, layout, shift)
    start, end = edges[..., :-1], edges[..., 1:]
    middle = (SHIFT_UNIT * (2 * index + 1) * length + 2 * num_bins * shift) // (2 * SHIFT_UNIT * num_bins)
    nearest = torch.minimum(middle.clamp_min(0), (length - 1).clamp_min(0))
    empty = start == end
    return torch.where(empty, nearest, start), torch.where(empty, nearest + 1, end)


def _absolute(start: Tensor, end: Tensor, spans: RowSpans, num_keys: int) -> tuple[Tensor, Tensor]:
    """Runs ``[N, R, K]`` counted from the first real key to positions in the key tensor.

    Runs that no real row reads are cut to something that can be read.
    """
    offset = spans.start[:, None, None]
    start = (start + offset).clamp_max(num_keys - 1)
    return start, torch.maximum((end + offset).clamp_max(num_keys), start + 1)


def _longest_run(num_keys: int, num_bins: int, shift: int = 0) -> int:
    """At least the keys of the largest bin of either layout."""
    return 2 * -(-num_keys // num_bins) + -(-abs(shift) // SHIFT_UNIT)


def _products(features: Tensor, pooled: Tensor) -> Tensor:
    """``features [N, H, R, F]`` with ``pooled [N, G, K, F]``: ``[N, H, R, K]``."""
    grouped = features.unflatten(1, (pooled.shape[1], -1)).flatten(2, 3)
    return (grouped @ pooled.mT).view(*features.shape[:3], -1)


def _own_products(features: Tensor, pooled: Tensor) -> Tensor:
    """``features [N, H, T, F]`` with each row's own ``pooled [N, G, T, F]``: ``[N, H, T, 1]``."""
    grouped = features.unflatten(1, (pooled.shape[1], -1))
    return (grouped * pooled[:, :, None]).sum(-1, keepdim=True).flatten(1, 2)


def _unpadded_widths(num_queries: int, num_keys: int, num_bins: int) -> Tensor:
    """Bin widths ``[1, T]`` without padding, known without asking the device."""
    return aligned_width(torch.arange(num_keys - num_queries, num_keys)[None] + 1, num_bins)


def _equal_width_rows(width: Tensor) -> list[slice]:
    """Longest stretches of rows in which no item's bin width changes."""
    changes = (width[:, 1:] != width[:, :-1]).any(0).nonzero()[:, 0] + 1
    edges = [0, *changes.tolist(), width.shape[1]]
    return [slice(first, last) for first, last in itertools.pairwise(edges)]


def _without_padding(scores: Tensor, spans: RowSpans) -> Tensor:
    return scores.masked_fill((spans.length == 0)[:, None, :, None], 0)
