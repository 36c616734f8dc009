"""Triton form of the pooled selection.

A program scores a block of rows against the pooled keys of the K bins of their width on the matrix units and finds each
row's threshold by bisection, in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks import HeadKeys
from ..triton_common import (
    aligned_level,
    cdiv,
    count_levels,
    group_rows,
    item_span,
    item_spans,
    next_power_of_2,
    on_device,
    row_span,
    with_dense_rows,
)
from ..triton_pooling import pool_bins
from ..triton_ranking import pack_largest

SCORES_PER_PROGRAM = 16384  # in half precision: 128 a thread, in registers


def pooled_selection(
    query: Tensor,
    key: Tensor,
    *,
    k: int,
    num_bins: int,
    causal: bool,
    scaling: float,
    mean_weight: Tensor,
    bound_weight: Tensor | None,
    keep_first: bool,
    keep_own: bool,
    attention_mask: Tensor | None,
    stride: int,
    head_k: HeadKeys | None,
) -> Tensor:
    """See :func:`sea_kernels.pooled_selection`; returns the packed bits."""
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    spans = item_spans(attention_mask)
    query, key = with_dense_rows(query), with_dense_rows(key)
    new = query.new_empty if spans is None else query.new_zeros  # with a stride, no program visits rows of padding
    bits = new(batch, heads, num_queries, num_bins // 32, dtype=torch.int32)
    levels = count_levels(num_keys, num_bins)
    bins_padded = next_power_of_2(num_bins)
    block = max(16, min(64, SCORES_PER_PROGRAM // bins_padded) * 2 // max(2, query.element_size()))
    with on_device(query):
        pooled = pool_bins(key, heads, num_bins, levels, spans, scaling, mean_weight, bound_weight)
        groups = cdiv(num_queries, stride) + (stride > 1)
        _select_kernel[(cdiv(groups, block), heads, batch)](
            query,
            pooled,
            bits.view(torch.int16),
            spans,
            None if head_k is None else head_k.tensor,
            *query.stride()[:3],
            num_queries,
            num_keys,
            levels,
            k,
            stride,
            HEAD_DIM=head_dim,
            CHUNK=min(64, max(16, next_power_of_2(head_dim))),
            PARTS=pooled.shape[4],
            NUM_BINS=num_bins,
            BINS_PADDED=bins_padded,
            ROWS=block,
            CAUSAL=causal,
            HAS_PADDING=spans is not None,
            HAS_STRIDE=stride > 1,
            KEEP_FIRST=keep_first,
            KEEP_OWN=keep_own,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=4,
            num_stages=1,  # there is little to load, and no register to spare
        )
    return bits


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "k", "stride"])
def _select_kernel(
    Q,
    POOLED,
    BITS,
    SPANS,
    HEAD_K,
    q_item,
    q_head,
    q_row,
    num_queries,
    num_keys,
    num_levels,
    k,
    stride,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BINS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_STRIDE: tl.constexpr,
    KEEP_FIRST: tl.constexpr,
    KEEP_OWN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, item = tl.program_id(1), tl.program_id(2).to(tl.int64)
    item_head = item * tl.num_programs(1) + head
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    offset = num_keys - num_queries - first  # position of row 0; negative where the queries begin with padding
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if HAS_STRIDE:
        leader, rows = group_rows(rows, offset, stride)
    position, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)

    used = tl.where(length > 0, (length + (1 << level) - 1) >> level, 0)
    # Bins that compete: first_candidate … last_candidate - 1, without a row's own bin.
    own = position >> level if KEEP_OWN else used * 0 - 1
    first_candidate = tl.where(used > 0, 1, 0) if KEEP_FIRST else used * 0
    forced_own = (used > 0) & (own >= first_candidate) if KEEP_OWN else used < 0
    forced_count = first_candidate + forced_own.to(tl.int32)
    if HEAD_K is not None:
        k = tl.load(HEAD_K + head)
    budget = tl.minimum(tl.maximum((2 * k + (1 << level)) >> (level + 1), tl.maximum(forced_count, 1)), used)
    # Without a bin to choose, as in long rows with few bins, there is no need of scores.
    bits = tl.zeros([ROWS, max(16, BINS_PADDED // 16)], tl.int32)
    if tl.max(budget - forced_count) > 0:
        p_q = Q + item * q_item + head.to(tl.int64) * q_head + rows.to(tl.int64)[:, None] * q_row
        pooled = POOLED + item_head * num_levels * (NUM_BINS * PARTS * HEAD_DIM)
        scores = _scores(
            p_q, pooled, length, level, HEAD_DIM, CHUNK, PARTS, NUM_BINS, BINS_PADDED, ROWS, PRECISION
        )  # fmt: skip
        o_bin = tl.arange(0, BINS_PADDED)
        lowest = tl.min(scores, 1)  # also of bins that do not compete: only a lower bound is needed
        last_candidate = used - forced_own.to(tl.int32) if CAUSAL else used  # a causal row's own bin is its last
        candidates = o_bin[None, :] < last_candidate[:, None]
        if KEEP_FIRST:
            candidates = candidates & (o_bin > 0)[None, :]
        if KEEP_OWN and not CAUSAL:
            candidates = candidates & (o_bin[None, :] != own[:, None])
        values = tl.where(candidates, scores, float("-inf"))
        bits = pack_largest(values, lowest, used - forced_count, budget - forced_count, BINS_PADDED)  # [ROWS, HALVES]

    HALVES: tl.constexpr = NUM_BINS // 16
    o_half = tl.arange(0, bits.shape[1])
    if KEEP_FIRST:
        bits = bits | tl.where((o_half == 0)[None, :] & (used > 0)[:, None], 1, 0)
    if KEEP_OWN:
        at_own = forced_own[:, None] & (o_half[None, :] == (own >> 4)[:, None])
        bits = bits | (tl.where(at_own, 1, 0) << (own & 15)[:, None])
    p_bits = BITS + item_head * num_queries * HALVES + o_half[None, :]
    m_half = (o_half < HALVES)[None, :]
    if HAS_STRIDE:
        for member in range(0, stride):
            row = leader + member - offset
            m_row = (length > 0) & (row >= 0) & (row < num_queries) & (leader + member < real)
            shared = bits
            if KEEP_OWN:
                shared = bits | _half_words(leader >> level, (leader + member) >> level, o_half)
            p_row = p_bits + row.to(tl.int64)[:, None] * HALVES
            tl.store(p_row, shared.to(tl.int16), mask=m_row[:, None] & m_half)
    else:
        m_row = (rows < num_queries)[:, None] & m_half
        tl.store(p_bits + rows.to(tl.int64)[:, None] * HALVES, bits.to(tl.int16), mask=m_row)


@triton.jit
def _half_words(begin, last, o_half):
    """Bits of the bins ``begin … last`` of every row, 16 in each of the ``[ROWS, HALVES]``."""
    low = tl.minimum(tl.maximum(begin[:, None] - 16 * o_half[None, :], 0), 16)
    high = tl.minimum(tl.maximum(last[:, None] + 1 - 16 * o_half[None, :], 0), 16)
    one = low * 0 + 1
    return (one << high) - (one << tl.minimum(low, high))


@triton.jit
def _scores(
    p_q,
    pooled,
    length,
    level,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BINS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of the bins of each row's width. [ROWS, BINS_PADDED]"""
    o_bin, o_chunk = tl.arange(0, BINS_PADDED), tl.arange(0, CHUNK)
    CHUNKS: tl.constexpr = (HEAD_DIM + CHUNK - 1) // CHUNK
    low = tl.min(tl.where(length > 0, level, 31))
    high = tl.max(level)
    pooled += low.to(tl.int64) * (NUM_BINS * PARTS * HEAD_DIM)
    scores = tl.zeros([ROWS, BINS_PADDED], tl.float32)
    # Counts from 0, since Triton finds no wide loads where the first step is a reduction's result.
    for step in range(0, (high - low + 1) * PARTS * CHUNKS):
        current, part, chunk = step // (PARTS * CHUNKS), step // CHUNKS % PARTS, step % CHUNKS
        o_dim = chunk * CHUNK + o_chunk
        m_q = ((length > 0) & (level == low + current))[:, None] & (o_dim < HEAD_DIM)[None, :]
        b_q = tl.load(p_q + o_dim[None, :], mask=m_q, other=0.0)  # [ROWS, CHUNK], 0 where the row's width differs
        if PARTS == 2:
            b_q = tl.where(part == 1, tl.abs(b_q), b_q)
        m_bin = (o_bin < NUM_BINS)[None, :] & (o_dim < HEAD_DIM)[:, None]
        p_bin = pooled + ((current * NUM_BINS + o_bin)[None, :] * PARTS + part) * HEAD_DIM + o_dim[:, None]
        b_bin = tl.load(p_bin, mask=m_bin, other=0.0)  # [CHUNK, BINS]
        scores = tl.dot(b_q, b_bin, scores, input_precision=PRECISION)
    return scores
