"""Triton forms of the pooled-key scores.

Where rows share their bins (aligned, or bidirectional), the bins are pooled once and a block of rows takes products
with them; only a causal row's own bin is pooled for it alone. What relative bins need is in ``triton_relative.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bins import Layout
from ..triton_common import (
    aligned_level,
    cdiv,
    count_levels,
    item_span,
    item_spans,
    next_power_of_2,
    on_device,
    with_dense_rows,
)
from ..triton_pooling import pool_bins
from .triton_relative import pool_relative_bins, score_own_edges

BLOCK_ROWS = 32  # divides K, so that a block of positions has one aligned width


def pooled_scores(
    query: Tensor,
    key: Tensor,
    *,
    num_bins: int,
    layout: Layout,
    causal: bool,
    scaling: float,
    statistic: str,
    attention_mask: Tensor | None,
    shift: int,
) -> Tensor:
    """See :func:`sea_kernels.pooled_scores`. No gradients."""
    spans = item_spans(attention_mask)
    query, key = with_dense_rows(query), with_dense_rows(key)
    with on_device(query):
        if causal and layout == "relative":
            return score_own_edges(query, key, num_bins, scaling, statistic, spans, shift)
        if layout == "aligned":
            levels = count_levels(key.shape[2], num_bins)
            pooled = pool_shared_bins(key, num_bins, levels, spans, scaling, statistic)
        else:
            pooled = pool_relative_bins(key, num_bins, scaling, statistic, spans, shift)
        scores = _empty_scores(query, num_bins, spans, query.dtype)
        _score_shared_bins(query, key, pooled, None, scores, spans, causal, layout, scaling)
    return scores


def weighted_scores(
    query: Tensor,
    key: Tensor,
    mean_weight: Tensor,
    bound_weight: Tensor,
    *,
    num_bins: int,
    causal: bool,
    scaling: float,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`sea_kernels.weighted_scores`, of aligned bins. No gradients.

    Returns:
        The scores, and for the backward pass the pooled bins: ``[N, G, levels, K, 3, D]``, see ``pool_bins``.
    """
    spans = item_spans(attention_mask)
    query, key = with_dense_rows(query), with_dense_rows(key)
    scores = _empty_scores(query, num_bins, spans, torch.float32)
    levels = count_levels(key.shape[2], num_bins)
    with on_device(query):
        pooled = pool_bins(key, key.shape[1], num_bins, levels, spans, scaling, None, None)
        weights = mean_weight, bound_weight
        _score_shared_bins(query, key, pooled, weights, scores, spans, causal, "aligned", scaling)
    return scores, pooled


def _empty_scores(query: Tensor, num_bins: int, spans: Tensor | None, dtype: torch.dtype) -> Tensor:
    new = query.new_empty if spans is None else query.new_zeros  # no program visits rows of padding
    return new(*query.shape[:3], num_bins, dtype=dtype)


def pool_shared_bins(
    key: Tensor, num_bins: int, levels: int, spans: Tensor | None, scaling: float, statistic: str
) -> Tensor:
    """Vectors of one statistic of the aligned bins as ``pool_bins`` has them: ``[N, G, levels, K, 1 or 2, D]``."""
    ones = torch.ones(key.shape[1], device=key.device)
    mean, bound = (ones, None) if statistic == "mean" else (torch.zeros_like(ones), ones)
    return pool_bins(key, key.shape[1], num_bins, levels, spans, scaling, mean, bound)


def _score_shared_bins(
    query: Tensor,
    key: Tensor,
    pooled: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    scores: Tensor,
    spans: Tensor | None,
    causal: bool,
    layout: Layout,
    scaling: float,
) -> None:
    """Fill ``scores``. ``weights`` are those of means and bounds where ``pooled`` has vectors of both."""
    batch, heads, num_queries, head_dim = query.shape
    groups, levels, num_bins, parts = pooled.shape[1:5]
    full = query.dtype == torch.float32  # products outside the matrix units, which need more registers
    narrow = full or num_bins % 64 or parts * head_dim > 256  # three vectors of wide heads would fill shared memory
    _shared_kernel[(cdiv(num_queries, BLOCK_ROWS) + 1, heads, batch)](
        query,
        key,
        pooled,
        *(weights or (None, None)),
        scores,
        spans,
        *query.stride()[:3],
        *key.stride()[:3],
        num_queries,
        key.shape[2],
        levels,
        heads // groups,
        scaling,
        HEAD_DIM=head_dim,
        HEAD_PADDED=max(16, next_power_of_2(head_dim)),
        PARTS=parts,
        NUM_BINS=num_bins,
        BINS=32 if narrow else 64,
        ROWS=BLOCK_ROWS,
        CAUSAL=causal,
        ALIGNED=layout == "aligned",
        HAS_PADDING=spans is not None,
        PRECISION="ieee" if full else "tf32",
        num_warps=8 if full else 4,
        num_stages=1 if full else 2,
    )


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "heads_per_group", "scaling"])
def _shared_kernel(
    Q,
    K,
    POOLED,
    MEAN_WEIGHT,
    BOUND_WEIGHT,
    SCORES,
    SPANS,
    q_item,
    q_head,
    q_row,
    k_item,
    k_head,
    k_row,
    num_queries,
    num_keys,
    num_levels,
    heads_per_group,
    scaling,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, item = tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    group = head // heads_per_group
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    offset = num_keys - num_queries - first  # position of row 0; negative where the queries begin with padding
    begin = (tl.maximum(offset, 0) // ROWS + tl.program_id(0)) * ROWS
    position = begin + tl.arange(0, ROWS)
    rows = position - offset
    m_row = (rows >= 0) & (rows < num_queries) & (position < real)
    o_dim = tl.arange(0, HEAD_PADDED)
    m_dim = o_dim < HEAD_DIM
    if PARTS == 3:
        mean_weight = tl.load(MEAN_WEIGHT + head).to(tl.float32)
        bound_weight = tl.load(BOUND_WEIGHT + head).to(tl.float32)
    p_q = Q + item * q_item + head.to(tl.int64) * q_head + rows.to(tl.int64)[:, None] * q_row + o_dim[None, :]
    b_q = tl.load(p_q, mask=m_row[:, None] & m_dim[None, :], other=0.0)  # [ROWS, HEAD]
    # A block past the end must not reach a level that was not pooled.
    level = aligned_level(tl.minimum(begin + 1, real) if CAUSAL else real, num_levels, NUM_BINS) if ALIGNED else 0
    if CAUSAL:
        p_k = K + item * k_item + group.to(tl.int64) * k_head + first.to(tl.int64) * k_row + o_dim[None, :]
        own = position >> level
        total, highest, lowest, count = pool_own_bin(
            p_k, k_row, m_dim, begin, position, real, level, PARTS, ROWS, HEAD_PADDED
        )
        own_q = b_q.to(tl.float32)
        own_score = tl.sum(own_q * total, 1) * scaling / count.to(tl.float32)
        if PARTS > 1:
            own_bound = tl.sum(tl.maximum(own_q * scaling * highest, own_q * scaling * lowest), 1)
            own_score = own_bound if PARTS == 2 else own_score * mean_weight + own_bound * bound_weight
    else:
        last = (real + (1 << level) - 1) >> level if ALIGNED else NUM_BINS
    POOLED += ((item * (heads // heads_per_group) + group) * num_levels + level) * (NUM_BINS * PARTS * HEAD_DIM)
    p_score = SCORES + ((item * heads + head) * num_queries + rows)[:, None] * NUM_BINS
    for first_bin in range(0, NUM_BINS, BINS):
        o_bin = first_bin + tl.arange(0, BINS)
        index = o_bin if CAUSAL else tl.minimum(o_bin, tl.maximum(last, 1) - 1)
        p_bin = POOLED + index[None, :] * (PARTS * HEAD_DIM) + o_dim[:, None]
        b_near = tl.load(p_bin, mask=m_dim[:, None], other=0.0)  # [HEAD, BINS]
        if PARTS > 1:
            b_far = tl.load(p_bin + (PARTS - 1) * HEAD_DIM, mask=m_dim[:, None], other=0.0)
        if PARTS == 3:
            center = tl.load(p_bin + HEAD_DIM, mask=m_dim[:, None], other=0.0).to(tl.float32)
            b_near = (b_near.to(tl.float32) * mean_weight + center * bound_weight).to(b_q.dtype)
            b_far = (b_far.to(tl.float32) * bound_weight).to(b_q.dtype)
        scores = tl.dot(b_q, b_near, input_precision=PRECISION)
        if PARTS > 1:
            scores = tl.dot(tl.abs(b_q), b_far, scores, input_precision=PRECISION)
        if CAUSAL:
            scores = tl.where(o_bin[None, :] < own[:, None], scores, own_score[:, None])
        tl.store(p_score + o_bin[None, :], scores.to(SCORES.dtype.element_ty), mask=m_row[:, None])


@triton.jit
def pool_own_bin(
    p_k,
    k_row,
    m_dim,
    begin,
    position,
    real,
    level,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
):
    """Keys of each row's own bin, from the bin's first key to the row's position. p_k: first real key.

    Returns their sum (1 part), their maximum and minimum (2 parts) or all three (3 parts), float32 [ROWS, HEAD], and
    their number [ROWS].
    """
    o_row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    highest = tl.full([ROWS, HEAD_PADDED], float("-inf"), tl.float32)
    lowest = tl.full([ROWS, HEAD_PADDED], float("inf"), tl.float32)
    # The keys before the block that lie in the bin of all its rows; none where bins are narrower than the block.
    for tile in range((begin >> level) << level, begin, ROWS):
        o_key = tile + o_row
        m_key = (o_key < real)[:, None] & m_dim[None, :]
        keys = tl.load(p_k + o_key.to(tl.int64)[:, None] * k_row, mask=m_key, other=0.0).to(tl.float32)
        if PARTS != 2:
            total += tl.sum(keys, 0)[None, :]
        if PARTS > 1:
            highest = tl.maximum(highest, tl.max(keys, 0)[None, :])
            lowest = tl.minimum(lowest, tl.min(keys, 0)[None, :])
    # Those of the block, one step further back at a time.
    start = (position >> level) << level
    for back in range(0, tl.minimum(1 << level, ROWS)):
        o_key = position - back
        m_key = ((o_key >= begin) & (o_key >= start))[:, None]
        inside = m_key & (o_key < real)[:, None] & m_dim[None, :]
        keys = tl.load(p_k + o_key.to(tl.int64)[:, None] * k_row, mask=inside, other=0.0).to(tl.float32)
        if PARTS != 2:
            total += keys
        if PARTS > 1:
            highest = tl.maximum(highest, tl.where(m_key, keys, float("-inf")))
            lowest = tl.minimum(lowest, tl.where(m_key, keys, float("inf")))
    return total, highest, lowest, position - start + 1
