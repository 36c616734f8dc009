"""Triton form of the pooled selection.

First, the keys of every bin of every width are pooled once per query head. With center = (max + min) / 2 and half =
(max - min) / 2, the score ``a q.mean + c sum_d max(q_d min_d, q_d max_d)`` is ``q.(a mean + c center) + |q|.(c half)``:
a bin is two vectors, *near* and *far*. Then a program scores a block of rows against the K bins of their width on the
matrix units and finds each row's threshold by bisection, in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import aligned_level, count_levels, item_span, item_spans, on_device, row_span, with_dense_rows


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
) -> Tensor:
    """See :func:`sea_kernels.pooled_selection`; returns the packed bits."""
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    spans = item_spans(attention_mask)
    query, key = with_dense_rows(query), with_dense_rows(key)
    new = query.new_empty if spans is None else query.new_zeros  # with a stride, no program visits rows of padding
    bits = new(batch, heads, num_queries, num_bins // 32, dtype=torch.int32)
    levels = count_levels(num_keys, num_bins)
    block = 64 if query.element_size() < 4 else 32
    with on_device(query):
        pooled = pool_bins(key, heads, num_bins, levels, spans, scaling, mean_weight, bound_weight)
        groups = triton.cdiv(num_queries, stride) + (stride > 1)
        _select_kernel[(triton.cdiv(groups, block), heads, batch)](
            query,
            pooled,
            bits.view(torch.int16),
            spans,
            *query.stride()[:3],
            num_queries,
            num_keys,
            levels,
            k,
            stride,
            HEAD_DIM=head_dim,
            CHUNK=min(64, max(16, triton.next_power_of_2(head_dim))),
            PARTS=pooled.shape[4],
            NUM_BINS=num_bins,
            BINS_PADDED=triton.next_power_of_2(num_bins),
            ROWS=block,
            CAUSAL=causal,
            HAS_PADDING=spans is not None,
            HAS_STRIDE=stride > 1,
            KEEP_FIRST=keep_first,
            KEEP_OWN=keep_own,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=4,
            num_stages=2,
        )
    return bits


def pool_bins(
    key: Tensor,
    heads: int,
    num_bins: int,
    levels: int,
    spans: Tensor | None,
    scaling: float,
    mean_weight: Tensor,
    bound_weight: Tensor | None,
) -> Tensor:
    """Near and far vectors of all bins: ``[N, H, levels, K, 1 or 2, D]`` in key's dtype (near alone without bound)."""
    batch, groups, num_keys, head_dim = key.shape
    parts = 1 if bound_weight is None else 2
    pooled = key.new_empty(batch, heads, levels, num_bins, parts, head_dim)
    _pool_kernel[(levels * num_bins, groups, batch)](
        key,
        pooled,
        spans,
        mean_weight,
        bound_weight,
        *key.stride()[:3],
        num_keys,
        levels,
        heads // groups,
        scaling,
        HEAD_DIM=head_dim,
        HEAD_PADDED=triton.next_power_of_2(head_dim),
        PARTS=parts,
        NUM_BINS=num_bins,
        HAS_PADDING=spans is not None,
        num_warps=1,
    )
    return pooled


@triton.jit(do_not_specialize=["num_keys", "levels", "heads_per_group", "scaling"])
def _pool_kernel(
    K,
    POOLED,
    SPANS,
    MEAN_WEIGHT,
    BOUND_WEIGHT,
    k_item,
    k_head,
    k_row,
    num_keys,
    levels,
    heads_per_group,
    scaling,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    level, index = tl.program_id(0) // NUM_BINS, tl.program_id(0) % NUM_BINS
    group, item = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    begin = index << level
    end = tl.minimum(begin + (1 << level), real)
    o_dim, o_tile = tl.arange(0, HEAD_PADDED), tl.arange(0, 16)
    m_dim = o_dim < HEAD_DIM
    K += item * k_item + group.to(tl.int64) * k_head
    total = tl.zeros([HEAD_PADDED], tl.float32)
    highest = tl.full([HEAD_PADDED], float("-inf"), tl.float32)
    lowest = tl.full([HEAD_PADDED], float("inf"), tl.float32)
    for offset in range(begin, end, 16):
        o_key = offset + o_tile
        m_key = (o_key < end)[:, None] & m_dim[None, :]
        keys = tl.load(K + (first + o_key).to(tl.int64)[:, None] * k_row + o_dim[None, :], mask=m_key, other=0.0)
        keys = keys.to(tl.float32)
        total += tl.sum(keys, 0)
        if PARTS == 2:
            highest = tl.maximum(highest, tl.max(tl.where(m_key, keys, float("-inf")), 0))
            lowest = tl.minimum(lowest, tl.min(tl.where(m_key, keys, float("inf")), 0))
    filled = end > begin  # a bin without keys is never a candidate; zeros keep the products finite
    highest, lowest = tl.where(filled, highest, 0.0), tl.where(filled, lowest, 0.0)
    mean = total / tl.maximum(end - begin, 1).to(tl.float32)
    for member in range(0, heads_per_group):
        head = group * heads_per_group + member
        near = mean * tl.load(MEAN_WEIGHT + head).to(tl.float32) * scaling
        place = ((item * tl.num_programs(1) * heads_per_group + head) * levels + level) * NUM_BINS + index
        p_out = POOLED + place * PARTS * HEAD_DIM + o_dim
        if PARTS == 2:
            half_bound = 0.5 * tl.load(BOUND_WEIGHT + head).to(tl.float32)
            near += half_bound * scaling * (highest + lowest)
            far = half_bound * tl.abs(scaling) * (highest - lowest)
            tl.store(p_out + HEAD_DIM, far.to(POOLED.dtype.element_ty), mask=m_dim)
        tl.store(p_out, near.to(POOLED.dtype.element_ty), mask=m_dim)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "k", "stride"])
def _select_kernel(
    Q,
    POOLED,
    BITS,
    SPANS,
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
        leader = (tl.maximum(offset, 0) // stride + rows) * stride
        rows = tl.maximum(leader, tl.maximum(offset, 0)) - offset
    position, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)

    o_bin, o_chunk = tl.arange(0, BINS_PADDED), tl.arange(0, CHUNK)
    CHUNKS: tl.constexpr = (HEAD_DIM + CHUNK - 1) // CHUNK
    p_q = Q + item * q_item + head.to(tl.int64) * q_head + rows.to(tl.int64)[:, None] * q_row
    pooled = POOLED + item_head * num_levels * (NUM_BINS * PARTS * HEAD_DIM)
    low = tl.min(tl.where(length > 0, level, 31))
    high = tl.max(level)
    scores = tl.zeros([ROWS, BINS_PADDED], tl.float32)
    for step in range(low * PARTS * CHUNKS, (high + 1) * PARTS * CHUNKS):
        current, part, chunk = step // (PARTS * CHUNKS), step // CHUNKS % PARTS, step % CHUNKS
        o_dim = chunk * CHUNK + o_chunk
        m_q = ((length > 0) & (level == current))[:, None] & (o_dim < HEAD_DIM)[None, :]
        b_q = tl.load(p_q + o_dim[None, :], mask=m_q, other=0.0)  # [ROWS, CHUNK], 0 where the row's width differs
        if PARTS == 2:
            b_q = tl.where(part == 1, tl.abs(b_q), b_q)
        m_bin = (o_bin < NUM_BINS)[None, :] & (o_dim < HEAD_DIM)[:, None]
        p_bin = pooled + ((current * NUM_BINS + o_bin)[None, :] * PARTS + part) * HEAD_DIM + o_dim[:, None]
        b_bin = tl.load(p_bin, mask=m_bin, other=0.0)  # [CHUNK, BINS]
        scores = tl.dot(b_q, b_bin, scores, input_precision=PRECISION)

    used = tl.where(length > 0, (length + (1 << level) - 1) >> level, 0)
    # Bins that compete: first_candidate … last_candidate - 1, without a row's own bin.
    own = position >> level if KEEP_OWN else used * 0 - 1
    first_candidate = tl.where(used > 0, 1, 0) if KEEP_FIRST else used * 0
    forced_own = (used > 0) & (own >= first_candidate) if KEEP_OWN else used < 0
    forced_count = first_candidate + forced_own.to(tl.int32)
    budget = tl.minimum(tl.maximum((2 * k + (1 << level)) >> (level + 1), tl.maximum(forced_count, 1)), used)
    lowest = tl.min(scores, 1)  # also of bins that do not compete: only a lower bound is needed
    last_candidate = used - forced_own.to(tl.int32) if CAUSAL else used  # a causal row's own bin is its last
    candidates = (o_bin[None, :] >= first_candidate[:, None]) & (o_bin[None, :] < last_candidate[:, None])
    if KEEP_OWN and not CAUSAL:
        candidates = candidates & (o_bin[None, :] != own[:, None])
    values = tl.where(candidates, scores, float("-inf"))
    bits = _largest(values, lowest, used - forced_count, budget - forced_count, BINS_PADDED)  # [ROWS, HALVES]

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
def _pack(keep, SIZE: tl.constexpr):
    """``keep [ROWS, SIZE]`` (bool) to 16 bits in each of ``[ROWS, max(16, SIZE / 16)]``, by a matrix product."""
    HALVES: tl.constexpr = 16 if SIZE < 256 else SIZE // 16
    o_bin, o_half = tl.arange(0, SIZE)[:, None], tl.arange(0, HALVES)[None, :]
    powers = tl.where((o_bin >> 4) == o_half, 1 << (o_bin & 15), 0).to(tl.float16)  # up to 2^15: exact
    return tl.dot(tl.where(keep, 1.0, 0.0).to(tl.float16), powers).to(tl.int32)


@triton.jit
def _largest(values, lowest, count, budget, SIZE: tl.constexpr):
    """Packed: the ``budget`` largest of each row's ``count`` candidates, the lowest index first among equals.

    values: [ROWS, SIZE], -inf where there is no candidate; lowest: [ROWS], no candidate lies below.
    """
    every = budget >= count
    highest = tl.max(values, 1)
    # More than ``budget`` values lie above ``below``, at most ``budget`` above ``above``.
    above = tl.where(every, float("-inf"), highest)
    below = lowest - tl.abs(lowest) * 0.001 - 1e-30
    searching = (budget > 0) & (every == 0)
    wanted = budget.to(tl.float32)
    while tl.max(searching.to(tl.int32)) > 0:
        for _ in tl.static_range(2):
            middle = 0.5 * below + 0.5 * above
            found = tl.sum(tl.where(values > middle[:, None], 1.0, 0.0), 1)
            searching = searching & (middle > below) & (middle < above)
            above = tl.where(searching & (found <= wanted), middle, above)
            below = tl.where(searching & (found > wanted), middle, below)
            searching = searching & (found != wanted)
    bits = _pack(values > above[:, None], SIZE)
    left = tl.where(every, 0.0, wanted - tl.sum(tl.where(values > above[:, None], 1.0, 0.0), 1))
    if tl.max(left) > 0:  # equal scores: bisect on their index
        index = tl.arange(0, SIZE)
        equal = (values > below[:, None]) & (values <= above[:, None]) & (left > 0)[:, None]
        short, enough = count * 0 - 1, count * 0 + (SIZE - 1)
        for _ in range(0, 14):
            middle_index = (short + enough + 1) // 2
            reached = tl.sum(tl.where(equal & (index[None, :] <= middle_index[:, None]), 1.0, 0.0), 1) >= left
            reached = reached | (middle_index >= enough)
            enough = tl.where(reached, tl.minimum(middle_index, enough), enough)
            short = tl.where(reached, short, middle_index)
        bits = bits | _pack(equal & (index[None, :] <= enough[:, None]), SIZE)
    return bits
