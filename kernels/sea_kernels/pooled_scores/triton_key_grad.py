"""From the gradients of pooled keys to those of the keys, one program per tile of keys: no program adds to another's.

A key takes part in one complete bin of every width, and in the own bins of the later rows in the bin that is its own at
its position: rows of one bin all have one width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import aligned_level, cdiv, item_span, next_power_of_2

TILE = 16  # keys of a program; divides K, so that positions of a tile have one aligned width
LATER_ROWS = tl.constexpr(8)  # behind the tile, of which a program takes in as many at a time


def key_gradient(
    query: Tensor,
    key: Tensor,
    tail: Tensor,
    grad_pooled: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    spans: Tensor | None,
    causal: bool,
    scaling: float,
) -> Tensor:
    """Gradient to key, in its dtype; 0 at padding.

    Args:
        query: ``[N, H, T, D]``, rows dense.
        key: ``[N, G, S, D]``, rows dense.
        tail: float32 ``[N, H, T]``, what flows to the score of each row's own bin.
        grad_pooled: float32 ``[N, G, levels, K, parts, D]``, gradient to means (1 part), to maxima and minima (2), or
            to all three.
        weights: with three parts those of means and bounds in the scores of each query head.
        spans: int32 ``[N, 2]`` or None.
        causal: whether rows pool their own bin for themselves; else ``tail`` is in ``grad_pooled``.
        scaling: factor of the scores.
    """
    batch, groups, num_keys, head_dim = key.shape
    levels, num_bins, parts = grad_pooled.shape[2:5]
    padded = next_power_of_2(head_dim)
    # With means, no program reads it.
    holders = grad_pooled if parts == 1 else _holders(key, levels, num_bins, spans)
    new = torch.empty if spans is None else torch.zeros  # no program visits padding
    grad_key = new(key.shape, dtype=key.dtype, device=key.device)
    _key_gradient_kernel[(cdiv(num_keys, TILE), groups, batch)](
        query,
        key,
        tail,
        grad_pooled,
        *(weights or (None, None)),
        holders,
        grad_key,
        spans,
        *query.stride()[:3],
        *key.stride()[:3],
        query.shape[2],
        num_keys,
        levels,
        query.shape[1] // groups,
        scaling,
        HEAD_DIM=head_dim,
        HEAD_PADDED=padded,
        PARTS=parts,
        NUM_BINS=num_bins,
        CAUSAL=causal,
        HAS_PADDING=spans is not None,
        KEYS=TILE,
        num_warps=max(1, padded // 64),
    )
    return grad_key


def _holders(key: Tensor, levels: int, num_bins: int, spans: Tensor | None) -> Tensor:
    """Position of the first key that has the bin's maximum and minimum: int32 ``[N, G, levels, K, 2, D]``."""
    batch, groups, num_keys, head_dim = key.shape
    holders = torch.empty(batch, groups, levels, num_bins, 2, head_dim, dtype=torch.int32, device=key.device)
    _holders_kernel[(levels * num_bins, groups, batch)](
        key,
        holders,
        spans,
        *key.stride()[:3],
        num_keys,
        levels,
        HEAD_DIM=head_dim,
        HEAD_PADDED=next_power_of_2(head_dim),
        NUM_BINS=num_bins,
        HAS_PADDING=spans is not None,
        num_warps=1,
    )
    return holders


@triton.jit(do_not_specialize=["num_keys", "levels"])
def _holders_kernel(
    K,
    HOLDERS,
    SPANS,
    k_item,
    k_head,
    k_row,
    num_keys,
    levels,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    level, index = tl.program_id(0) // NUM_BINS, tl.program_id(0) % NUM_BINS
    group, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    begin = index << level
    end = tl.minimum(begin + (1 << level), real)
    o_dim, o_tile = tl.arange(0, HEAD_PADDED), tl.arange(0, 16)
    m_dim = o_dim < HEAD_DIM
    K += item * k_item + group * k_head + o_dim[None, :]
    highest = tl.full([HEAD_PADDED], float("-inf"), tl.float32)
    lowest = tl.full([HEAD_PADDED], float("inf"), tl.float32)
    top = tl.full([HEAD_PADDED], -1, tl.int32)
    bottom = tl.full([HEAD_PADDED], -1, tl.int32)
    for offset in range(begin, end, 16):
        o_key = offset + o_tile
        real_key = (o_key < end)[:, None]
        keys = tl.load(K + (first + o_key).to(tl.int64)[:, None] * k_row, mask=real_key & m_dim[None, :], other=0.0)
        keys = keys.to(tl.float32)
        high, low = tl.where(real_key, keys, float("-inf")), tl.where(real_key, keys, float("inf"))
        new_highest, new_lowest = tl.max(high, 0), tl.min(low, 0)
        first_high = tl.min(tl.where(high == new_highest[None, :], o_key[:, None], end), 0)
        first_low = tl.min(tl.where(low == new_lowest[None, :], o_key[:, None], end), 0)
        top = tl.where(new_highest > highest, first_high, top)
        bottom = tl.where(new_lowest < lowest, first_low, bottom)
        highest, lowest = tl.maximum(highest, new_highest), tl.minimum(lowest, new_lowest)
    p_out = HOLDERS + (((item * tl.num_programs(1) + group) * levels + level) * NUM_BINS + index) * (2 * HEAD_DIM)
    tl.store(p_out + o_dim, top, mask=m_dim)
    tl.store(p_out + HEAD_DIM + o_dim, bottom, mask=m_dim)


@triton.jit
def _load_keys(p_k, position, m_key, k_row, m_dim):
    """Keys at ``position [KEYS]``, float32 [KEYS, HEAD]; p_k: first real key."""
    p_key = p_k + position.to(tl.int64)[:, None] * k_row
    return tl.load(p_key, mask=m_key[:, None] & m_dim[None, :], other=0.0).to(tl.float32)


@triton.jit
def _row_gradients(
    p_q,
    p_tail,
    MEAN_WEIGHT,
    BOUND_WEIGHT,
    first_head,
    position,
    m_row,
    offset,
    num_queries,
    q_head,
    q_row,
    m_dim,
    level,
    scaling,
    heads_per_group,
    PARTS: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
):
    """What rows send to each key of their own bin, to the one that has its maximum, and to that of its minimum.

    Without the factor ``scaling``; the query heads of a key head are added in their order, each times its weight.
    p_q, p_tail: head 0, row 0.
    position: [ROWS], of the rows.
    Each float32 [ROWS, HEAD]
    """
    ROWS: tl.constexpr = position.shape[0]
    rows = (position - offset).to(tl.int64)
    m_row = m_row & (rows >= 0) & (rows < num_queries)
    to_mean = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    to_maximum = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    to_minimum = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    for member in range(0, heads_per_group):
        head = first_head + member
        p_row = p_q + head * q_head + rows[:, None] * q_row
        b_q = tl.load(p_row, mask=m_row[:, None] & m_dim[None, :], other=0.0).to(tl.float32)
        b_tail = tl.load(p_tail + head * num_queries + rows, mask=m_row, other=0.0)[:, None]
        if PARTS != 2:
            weight = 1.0 if MEAN_WEIGHT is None else tl.load(MEAN_WEIGHT + head).to(tl.float32)
            to_mean += weight * b_tail * b_q
        if PARTS > 1:
            weight = 1.0 if BOUND_WEIGHT is None else tl.load(BOUND_WEIGHT + head).to(tl.float32)
            sent = weight * b_tail * b_q
            to_maximum += tl.where(b_q * scaling > 0, sent, 0.0)
            to_minimum += tl.where(b_q * scaling < 0, sent, 0.0)
    to_mean /= (position - ((position >> level) << level) + 1).to(tl.float32)[:, None]
    return to_mean, to_maximum, to_minimum


@triton.jit
def _highest_before(p_k, begin, end, k_row, m_dim, side, HEAD_PADDED: tl.constexpr, KEYS: tl.constexpr):
    """Maximum of ``side`` times the keys from ``begin`` to ``end``, a multiple of KEYS further. [1, HEAD]"""
    highest = tl.full([1, HEAD_PADDED], float("-inf"), tl.float32)
    for tile in range(begin, end, KEYS):
        o_key = tile + tl.arange(0, KEYS)
        highest = tl.maximum(highest, tl.max(_load_keys(p_k, o_key, o_key < end, k_row, m_dim) * side, 0)[None, :])
    return highest


@triton.jit
def _rows_before_a_greater(sent, keys, highest, m_row):
    """Sum [1, HEAD] of ``sent`` over the rows before the first whose key is greater than ``highest``.

    Also ``highest`` for the rows that follow: where a key was greater, any is.
    """
    o_row = tl.arange(0, sent.shape[0])[:, None]
    first = tl.min(tl.where(m_row[:, None] & (keys > highest), o_row, sent.shape[0]), 0)[None, :]
    sent = tl.where(o_row < first, sent, 0.0)
    return tl.sum(sent, 0)[None, :], tl.where(first < sent.shape[0], float("-inf"), highest)


@triton.jit
def _own_gradient(
    p_q,
    p_k,
    p_tail,
    MEAN_WEIGHT,
    BOUND_WEIGHT,
    first_head,
    begin,
    real,
    level,
    offset,
    num_queries,
    q_head,
    q_row,
    k_row,
    m_dim,
    scaling,
    heads_per_group,
    PARTS: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradient to a tile of keys from the own bins of rows at and after them. float32 [KEYS, HEAD]

    The rows of the tile come one after the other, and with each its key. So it is known which key is the first that
    has the maximum, or minimum, of a row's own bin up to it.
    """
    o_key = (begin + tl.arange(0, KEYS))[:, None]
    grad = tl.zeros([KEYS, HEAD_PADDED], tl.float32)
    upper = _highest_before(p_k, (begin >> level) << level, begin, k_row, m_dim, 1, HEAD_PADDED, KEYS)
    lower = _highest_before(p_k, (begin >> level) << level, begin, k_row, m_dim, -1, HEAD_PADDED, KEYS)
    top = tl.full([1, HEAD_PADDED], -1, tl.int32)  # a key of an earlier tile
    bottom = top
    for row in range(begin, tl.minimum(begin + KEYS, real)):
        position = row + tl.arange(0, 1)
        to_mean, to_maximum, to_minimum = _row_gradients(
            p_q, p_tail, MEAN_WEIGHT, BOUND_WEIGHT, first_head, position, position < real, offset, num_queries,
            q_head, q_row, m_dim, level, scaling, heads_per_group, PARTS, HEAD_PADDED,
        )  # fmt: skip
        start = (row >> level) << level
        if PARTS != 2:
            grad += tl.where((o_key >= start) & (o_key <= row), to_mean, 0.0)
        if PARTS > 1:
            key = _load_keys(p_k, position, position < real, k_row, m_dim)
            above, below = (key > upper) | (start == row), (-key > lower) | (start == row)
            upper, lower = tl.where(above, key, upper), tl.where(below, -key, lower)
            top, bottom = tl.where(above, row, top), tl.where(below, row, bottom)
            grad += tl.where(o_key == top, to_maximum, 0.0) + tl.where(o_key == bottom, to_minimum, 0.0)
    # Rows behind the tile in a bin wider than it.
    from_mean = tl.zeros([1, HEAD_PADDED], tl.float32)
    from_maximum = tl.zeros([1, HEAD_PADDED], tl.float32)
    from_minimum = tl.zeros([1, HEAD_PADDED], tl.float32)
    for first_row in range(begin + KEYS, tl.minimum(((begin >> level) + 1) << level, real), LATER_ROWS):
        position = first_row + tl.arange(0, LATER_ROWS)
        m_row = position < real
        to_mean, to_maximum, to_minimum = _row_gradients(
            p_q, p_tail, MEAN_WEIGHT, BOUND_WEIGHT, first_head, position, m_row, offset, num_queries, q_head, q_row,
            m_dim, level, scaling, heads_per_group, PARTS, HEAD_PADDED,
        )  # fmt: skip
        from_mean += tl.sum(to_mean, 0)[None, :]
        if PARTS > 1:
            keys = _load_keys(p_k, position, m_row, k_row, m_dim)
            sent, upper = _rows_before_a_greater(to_maximum, keys, upper, m_row)
            from_maximum += sent
            sent, lower = _rows_before_a_greater(to_minimum, -keys, lower, m_row)
            from_minimum += sent
    grad += tl.where(o_key == top, from_maximum, 0.0) + tl.where(o_key == bottom, from_minimum, 0.0)
    return grad + from_mean


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "heads_per_group", "scaling"])
def _key_gradient_kernel(
    Q,
    K,
    TAIL,
    GRAD_POOLED,
    MEAN_WEIGHT,
    BOUND_WEIGHT,
    HOLDERS,
    GRAD_K,
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
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    KEYS: tl.constexpr,
):
    group, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    item_group = item * tl.num_programs(1) + group
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    begin = tl.program_id(0) * KEYS
    o_key, o_dim = begin + tl.arange(0, KEYS), tl.arange(0, HEAD_PADDED)
    m_key, m_dim = o_key < real, o_dim < HEAD_DIM
    m_out = m_key[:, None] & m_dim[None, :]
    grad = tl.zeros([KEYS, HEAD_PADDED], tl.float32)
    # Widths that rows have and whose K bins reach the tile.
    widest = aligned_level(real, num_levels, NUM_BINS)
    narrowest = aligned_level(begin + 1, num_levels, NUM_BINS) if CAUSAL else widest
    for level in range(narrowest, widest + 1):
        index = o_key >> level
        place = ((item_group * num_levels + level) * NUM_BINS + index)[:, None]
        p_grad = GRAD_POOLED + place * (PARTS * HEAD_DIM) + o_dim[None, :]
        if PARTS != 2:
            count = tl.minimum(1 << level, real - (index << level))
            grad += tl.load(p_grad, mask=m_out, other=0.0) / tl.maximum(count, 1).to(tl.float32)[:, None]
        if PARTS > 1:
            upper = tl.load(p_grad + (PARTS - 2) * HEAD_DIM, mask=m_out, other=0.0)
            lower = tl.load(p_grad + (PARTS - 1) * HEAD_DIM, mask=m_out, other=0.0)
            p_holder = HOLDERS + place * (2 * HEAD_DIM) + o_dim[None, :]
            top = tl.load(p_holder, mask=m_out, other=-1)
            bottom = tl.load(p_holder + HEAD_DIM, mask=m_out, other=-1)
            grad += tl.where(top == o_key[:, None], upper, 0.0) + tl.where(bottom == o_key[:, None], lower, 0.0)
    offset = num_keys - num_queries - first
    end = tl.minimum(tl.maximum(((begin >> narrowest) + 1) << narrowest, begin + KEYS), real)
    if CAUSAL and end > tl.maximum(offset, begin):  # some row lies in the tile's bins
        p_q = Q + item * q_item + o_dim[None, :]
        p_k = K + item * k_item + group * k_head + first.to(tl.int64) * k_row + o_dim[None, :]
        first_head = group * heads_per_group
        p_tail = TAIL + item * tl.num_programs(1) * heads_per_group * num_queries
        grad += scaling * _own_gradient(
            p_q, p_k, p_tail, MEAN_WEIGHT, BOUND_WEIGHT, first_head, begin, real, narrowest, offset, num_queries,
            q_head, q_row, k_row, m_dim, scaling, heads_per_group, PARTS, HEAD_PADDED, KEYS,
        )  # fmt: skip
    p_out = GRAD_K + (item_group * num_keys + first + o_key)[:, None] * HEAD_DIM + o_dim[None, :]
    tl.store(p_out, grad.to(GRAD_K.dtype.element_ty), mask=m_out)
