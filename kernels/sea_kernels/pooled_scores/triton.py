"""Triton forms of the pooled-key scores.

Where rows share their bins (aligned, or bidirectional), the bins are pooled once and a block of rows takes products
with them; only a causal row's own bin is pooled for it alone. Causal relative bins have other edges in every row: a
program per row reads each bin from a table of prefix sums or of maxima, and no pooled keys of all rows exist.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bins import SHIFT_UNIT, Layout
from ..pooling import RunPool
from ..triton_common import (
    aligned_level,
    cdiv,
    count_levels,
    item_span,
    item_spans,
    next_power_of_2,
    on_device,
    row_span,
    with_dense_rows,
)
from ..triton_entries import relative_start
from ..triton_pooling import pool_bins

BLOCK_ROWS = 32  # divides K, so that a block of positions has one aligned width
TILE_KEYS = 32


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
            return _score_own_edges(query, key, num_bins, scaling, statistic, spans, shift)
        if layout == "aligned":
            levels = count_levels(key.shape[2], num_bins)
            pooled = pool_shared_bins(key, num_bins, levels, spans, scaling, statistic)
        else:
            pooled = _pool_relative_bins(key, num_bins, scaling, statistic, spans, shift)
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


def _pool_relative_bins(
    key: Tensor, num_bins: int, scaling: float, statistic: str, spans: Tensor | None, shift: int
) -> Tensor:
    """Vectors of an item's relative bins as ``pool_bins`` has them, of one level: ``[N, G, 1, K, 1 or 2, D]``."""
    batch, groups, num_keys, head_dim = key.shape
    parts = 1 if statistic == "mean" else 2
    pooled = key.new_empty(batch, groups, 1, num_bins, parts, head_dim)
    _pool_relative_kernel[(num_bins, groups, batch)](
        key,
        pooled,
        spans,
        *key.stride()[:3],
        num_keys,
        shift,
        scaling,
        HEAD_DIM=head_dim,
        HEAD_PADDED=next_power_of_2(head_dim),
        PARTS=parts,
        NUM_BINS=num_bins,
        HAS_PADDING=spans is not None,
        TILE=TILE_KEYS,
        num_warps=1,
    )
    return pooled


def _score_own_edges(
    query: Tensor, key: Tensor, num_bins: int, scaling: float, statistic: str, spans: Tensor | None, shift: int
) -> Tensor:
    batch, heads, num_queries, head_dim = query.shape
    groups, num_keys = key.shape[1:3]
    longest = 2 * cdiv(num_keys, num_bins) + cdiv(abs(shift), SHIFT_UNIT)
    table = RunPool(key, statistic, longest).table
    scores = query.new_empty(batch, heads, num_queries, num_bins)
    _own_edges_kernel[(num_queries, groups, batch)](
        query,
        table,
        scores,
        spans,
        *query.stride()[:3],
        num_queries,
        num_keys,
        1 if statistic == "mean" else table.shape[2],
        heads // groups,
        shift,
        scaling,
        HEAD_DIM=head_dim,
        HEAD_PADDED=next_power_of_2(head_dim),
        NUM_BINS=num_bins,
        BINS=32,
        IS_MEAN=statistic == "mean",
        HAS_PADDING=spans is not None,
        num_warps=4,
    )
    return scores


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


@triton.jit(do_not_specialize=["num_keys", "shift", "scaling"])
def _pool_relative_kernel(
    K,
    POOLED,
    SPANS,
    k_item,
    k_head,
    k_row,
    num_keys,
    shift,
    scaling,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    TILE: tl.constexpr,
):
    index, group, item = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    start, end = _pooled_run(index, real, shift, NUM_BINS)
    o_dim, o_tile = tl.arange(0, HEAD_PADDED), tl.arange(0, TILE)
    m_dim = o_dim < HEAD_DIM
    p_k = K + item * k_item + group.to(tl.int64) * k_head + first.to(tl.int64) * k_row + o_dim[None, :]
    total = tl.zeros([HEAD_PADDED], tl.float32)
    highest = tl.full([HEAD_PADDED], float("-inf"), tl.float32)
    lowest = tl.full([HEAD_PADDED], float("inf"), tl.float32)
    for tile in range(start, end, TILE):
        o_key = tile + o_tile
        m_key = ((o_key < end) & (o_key < real))[:, None]
        keys = tl.load(p_k + o_key[:, None] * k_row, mask=m_key & m_dim[None, :], other=0.0).to(tl.float32)
        if PARTS == 1:
            total += tl.sum(keys, 0)
        else:
            highest = tl.maximum(highest, tl.max(tl.where(m_key, keys, float("-inf")), 0))
            lowest = tl.minimum(lowest, tl.min(tl.where(m_key, keys, float("inf")), 0))
    p_out = POOLED + ((item * tl.num_programs(1) + group) * NUM_BINS + index) * (PARTS * HEAD_DIM) + o_dim
    if PARTS == 1:
        near = total * (scaling / (end - start).to(tl.float32))
    else:
        near = 0.5 * scaling * (highest + lowest)
        far = 0.5 * tl.abs(scaling) * (highest - lowest)
        tl.store(p_out + HEAD_DIM, far.to(POOLED.dtype.element_ty), mask=m_dim)
    tl.store(p_out, near.to(POOLED.dtype.element_ty), mask=m_dim)


@triton.jit
def _pooled_run(index, length, shift, NUM_BINS: tl.constexpr):
    """Start and end of the keys that stand for a relative bin, int64: its own, or the nearest to its middle."""
    start = relative_start(index, length, shift, NUM_BINS, True)
    end = relative_start(index + 1, length, shift, NUM_BINS, True)
    length = length.to(tl.int64)
    middle = (256 * (2 * index + 1) * length + 2 * NUM_BINS * shift) // (512 * NUM_BINS)
    nearest = tl.minimum(tl.maximum(middle, 0), tl.maximum(length - 1, 0))
    empty = start == end
    return tl.where(empty, nearest, start), tl.where(empty, nearest + 1, end)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "heads_per_group", "shift", "scaling"])
def _own_edges_kernel(
    Q,
    TABLE,
    SCORES,
    SPANS,
    q_item,
    q_head,
    q_row,
    num_queries,
    num_keys,
    num_levels,
    heads_per_group,
    shift,
    scaling,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BINS: tl.constexpr,
    IS_MEAN: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    """One row against its own bins, for all query heads of a key head."""
    row, group, item = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(1)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    _, length = row_span(row, num_queries, num_keys, first, real, True)
    o_dim = tl.arange(0, HEAD_PADDED)
    m_dim = o_dim < HEAD_DIM
    for first_bin in range(0, NUM_BINS, BINS):
        o_bin = first_bin + tl.arange(0, BINS)
        start, end = _pooled_run(o_bin, length, shift, NUM_BINS)
        mask = (length > 0) & m_dim[None, :]
        if IS_MEAN:
            p_sum = TABLE + (item * groups + group) * (num_keys + 1) * HEAD_DIM + o_dim[None, :]
            total = tl.load(p_sum + (first + end)[:, None] * HEAD_DIM, mask=mask, other=0.0)
            total -= tl.load(p_sum + (first + start)[:, None] * HEAD_DIM, mask=mask, other=0.0)
            upper = (total / (end - start)[:, None].to(tl.float64)).to(tl.float32)  # [BINS, HEAD]
        else:
            level = start * 0
            for exponent in range(1, num_levels):
                level += (end - start >= (1 << exponent)).to(tl.int64)
            p_max = TABLE + (item * groups + group) * num_levels * num_keys * (2 * HEAD_DIM) + o_dim[None, :]
            p_one = p_max + (level * num_keys + first + start)[:, None] * (2 * HEAD_DIM)
            p_two = p_max + (level * num_keys + first + end - (1 << level))[:, None] * (2 * HEAD_DIM)
            upper = tl.maximum(tl.load(p_one, mask=mask, other=0.0), tl.load(p_two, mask=mask, other=0.0))
            lower = tl.maximum(
                tl.load(p_one + HEAD_DIM, mask=mask, other=0.0), tl.load(p_two + HEAD_DIM, mask=mask, other=0.0)
            )
        for member in range(0, heads_per_group):
            head = group * heads_per_group + member
            p_q = Q + item * q_item + head.to(tl.int64) * q_head + row.to(tl.int64) * q_row + o_dim
            b_q = tl.load(p_q, mask=m_dim & (length > 0), other=0.0).to(tl.float32)[None, :] * scaling
            if IS_MEAN:
                scores = tl.sum(b_q * upper, 1)
            else:
                scores = tl.sum(tl.maximum(b_q, 0.0) * upper + tl.maximum(-b_q, 0.0) * lower, 1)
            p_score = SCORES + ((item * groups * heads_per_group + head) * num_queries + row) * NUM_BINS + o_bin
            tl.store(p_score, scores.to(SCORES.dtype.element_ty))
