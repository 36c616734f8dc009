"""Gradient to the queries of many neighbouring rows at a time that attend to the aligned bins that they keep.

A block of rows walks the list that it walked in the forward pass. With the row's log-sum every weight p is known at
once: ``dq = scaling * sum p (grad_output . v - delta) k``. In the far field the sum begins with the bins that
rows do not keep (``triton_pooled_bins_backward.py``).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .masks import BinMask
from .triton_common import aligned_level, item_span, next_power_of_2, row_span
from .triton_pooled_bins_backward import add_pooled_bins
from .triton_wide_lists import (
    MOST_STRIDE,
    TILE,
    WideLists,
    backward_rows,
    kept_bins,
    keys_of_tile,
    lists_of_blocks,
    load_rows,
    load_tile,
    seen_by_all,
    seen_by_any,
    tile_and_least_level,
    tile_starts,
    visit_tile,
    weights_of_bins,
)

LOG2E = 1.4426950408889634


def differentiate_queries_in_bins(
    query: Tensor,
    output: Tensor,
    grad_output: Tensor,
    log_sums: Tensor,
    delta: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BinMask,
    grad_query: Tensor,
    *,
    causal: bool,
    scaling: float,
    spans: Tensor | None,
    row_scale: Tensor | None = None,
    grad_scale: Tensor | None = None,
    pooled: Sequence[Tensor | None] = (None, None, None),
    lists: WideLists | None = None,
) -> None:
    """Fill ``grad_query`` and ``delta``, and what else is asked for.

    Args:
        query: ``[N, H, T, D]``; its last dimension is contiguous, as those of grad_output, key and value are.
        output: ``[N, H, T, E]``, contiguous.
        grad_output: ``[N, H, T, E]``.
        log_sums: float32 ``[N, H, T]``, contiguous, log2 of each row's sum of exponentials.
        delta: float32 ``[N, H, T]``, contiguous, product of grad_output and output.
        key: ``[N, G, S, D]``.
        value: ``[N, G, S, E]``.
        mask: aligned bins.
        grad_query: like query.
        causal: whether a row sees only keys up to its own position.
        scaling: factor of the scores.
        spans: int32 ``[N, 2]`` of ``triton_common.item_spans``, or None.
        row_scale: None, or float32 ``[N, H, T]``, contiguous, factor of every row's result.
        grad_scale: None, or ``[N, H, T]``, contiguous, for the gradient to ``row_scale``.
        pooled: keys, values and offsets of all pooled bins of every head, contiguous, if rows attend to the bins that
            they do not keep as well. There is no ``row_scale`` then.
        lists: what the forward pass kept, if anything.
    """
    batch, heads, num_queries, head_dim = query.shape
    value_dim = value.shape[-1]
    row_bytes = max(head_dim, value_dim) * query.itemsize
    tile, least = tile_and_least_level(row_bytes)
    if lists is None:
        rows = backward_rows(query, value)
        lists = lists_of_blocks(query, key, value, mask, causal=causal, spans=spans, rows=rows)
    key, value = (x if x.stride(2) <= MOST_STRIDE else x.contiguous() for x in (key, value))
    for entries in lists.entries():
        _query_kernel[(entries.meta.shape[1], batch * heads)](
            query,
            key,
            value,
            output,
            grad_output,
            grad_query,
            *pooled,
            log_sums,
            delta,
            row_scale,
            grad_scale,
            lists.bits,
            entries.packed,
            entries.meta,
            spans,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *grad_output.stride()[:3],
            *grad_query.stride()[:3],
            heads // key.shape[1],
            heads,
            num_queries,
            lists.num_keys,
            entries.first_block,
            lists.levels,
            scaling * LOG2E,
            scaling,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            HEAD_PADDED=max(16, next_power_of_2(head_dim)),
            VALUE_PADDED=max(16, next_power_of_2(value_dim)),
            TILE=TILE,
            WHOLE_TILE=tile,
            LEAST_LEVEL=least,
            LEVELS=min(lists.levels, tile.bit_length()),
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            **lists.flags(),
            **_launch_config(query.dtype, row_bytes),
        )


def _launch_config(dtype: torch.dtype, row_bytes: int) -> dict:
    """Launch parameters; ``row_bytes`` of the wider of keys and values."""
    # Keys of the rest come by way of a list: it takes five stages to load some while others are in use.
    config = {"num_stages": 3, "REST_STAGES": 5 if row_bytes <= 256 else 3}
    if dtype.itemsize > 2:  # without matrix units the products take many registers
        return config | {"num_warps": 8}
    return config | {"num_warps": 4, "maxnreg": 168 if row_bytes <= 128 else None}


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_block", "num_levels", "scale", "scaling"])
def _query_kernel(
    Q,
    K,
    V,
    OUT,
    GRAD_OUT,
    GRAD_Q,
    BIN_K,
    BIN_V,
    BIN_OFFSET,
    LOG_SUM,
    DELTA,
    ROW_SCALE,
    GRAD_SCALE,
    BITS,
    ENTRIES,
    META,
    SPANS,
    q_item,
    q_head,
    q_row,
    k_item,
    k_head,
    k_row,
    v_item,
    v_head,
    v_row,
    g_item,
    g_head,
    g_row,
    gq_item,
    gq_head,
    gq_row,
    heads_per_group,
    heads,
    num_queries,
    num_keys,
    first_block,
    num_levels,
    scale,
    scaling,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE_TILE: tl.constexpr,
    LEAST_LEVEL: tl.constexpr,
    LEVELS: tl.constexpr,
    REST_STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys come first
    item_head = tl.program_id(1).to(tl.int64)
    item, head = item_head // heads, item_head % heads
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = (first_block + block) * ROWS + tl.arange(0, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    m_row, seeing = rows < num_queries, length > 0
    o_dim, o_value = tl.arange(0, HEAD_PADDED), tl.arange(0, VALUE_PADDED)
    m_dim, m_value = (o_dim < HEAD_DIM)[None, :], (o_value < VALUE_DIM)[None, :]
    row, long_rows = item_head * num_queries + rows, rows.to(tl.int64)[:, None]
    p_q = Q + item * q_item + head * q_head + long_rows * q_row + o_dim[None, :]
    b_q = tl.load(p_q, mask=seeing[:, None] & m_dim, other=0.0)  # [ROWS, HEAD]
    p_do = GRAD_OUT + item * g_item + head * g_head + long_rows * g_row + o_value[None, :]
    b_do = tl.load(p_do, mask=seeing[:, None] & m_value, other=0.0)  # [ROWS, VALUE]
    log_sum = tl.load(LOG_SUM + row, mask=m_row, other=0.0)
    p_out = OUT + row[:, None] * VALUE_DIM + o_value[None, :]
    b_out = tl.load(p_out, mask=m_row[:, None] & m_value, other=0.0)
    delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    acc = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    p_words = BITS + row * (NUM_BINS // 32)
    if BIN_K is not None:
        bins = item_head * num_levels * NUM_BINS
        acc = add_pooled_bins(
            b_q, b_do, BIN_K + bins * HEAD_DIM, BIN_V + bins * VALUE_DIM, BIN_OFFSET + bins, p_words, seeing, length,
            level, log_sum, delta, acc, scaling,
            0, HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED, NUM_BINS, PRECISION,
        )  # fmt: skip
    tl.store(DELTA + row, delta, mask=m_row)  # after the bins, which spills fewer registers
    factor = tl.full([ROWS], 1.0, tl.float32)
    if ROW_SCALE is not None:
        factor = tl.load(ROW_SCALE + row, mask=m_row, other=0.0)
    mean = tl.zeros([ROWS], tl.float32)  # of the products with the gradient: the gradient of the row's factor

    K += item * k_item + (head // heads_per_group) * k_head + first.to(tl.int64) * k_row
    V += item * v_item + (head // heads_per_group) * v_head + first.to(tl.int64) * v_row
    place = item_head * tl.num_programs(0) + block
    ENTRIES += place * CAPACITY
    unit = tl.load(META + place * 3 + 1)  # log2 of an entry's keys
    count, whole = tl.load(META + place * 3), tl.load(META + place * 3 + 2)

    # Tiles that all rows see whole, as in the forward pass: each width of bins has a loop of its own. One that is alone
    # has no condition: within one the compiler makes products of wide rows wait for each other.
    seen = seen_by_all(ENTRIES, count, whole, unit, length)
    taken = whole * 0  # keys along the list
    width = tl.load(ENTRIES, mask=whole > 0, other=0) & 31  # log2 of the bins' keys
    for own in tl.static_range(LEAST_LEVEL, LEVELS):
        if LEVELS == LEAST_LEVEL + 1 or (width == own) | ((width > own) & (own == LEVELS - 1)):
            steps = seen // WHOLE_TILE
            taken = steps * WHOLE_TILE
            acc, mean = _take_whole_bins(
                b_q, b_do, K, V, k_row, v_row, scale, ENTRIES, p_words, seeing, steps, width,
                log_sum, factor, delta, acc, mean,
                own, HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED, WHOLE_TILE, GRAD_SCALE is not None, PRECISION,
            )  # fmt: skip

    tiles = unit - 5  # log2 of an entry's
    seen = seen_by_any(ENTRIES, count, whole, unit, length)
    for step in tl.range(taken // TILE, tl.cdiv(seen, TILE), num_stages=REST_STAGES):
        o_key, keep = visit_tile(ENTRIES, p_words, step, tiles, length, level, TILE)
        b_k = load_tile(K, o_key, o_key < real, k_row, HEAD_DIM, HEAD_PADDED)
        b_v = load_tile(V, o_key, o_key < real, v_row, VALUE_DIM, VALUE_PADDED)
        products = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        weights = tl.exp2(tl.where(keep, products * scale - log_sum[:, None], float("-inf")))
        grad_weights = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        acc = _add_keys(weights, grad_weights, b_k, factor, delta, acc, PRECISION)
        if GRAD_SCALE is not None:
            mean += tl.sum(weights * grad_weights, 1)

    p_grad = GRAD_Q + item * gq_item + head * gq_head + long_rows * gq_row + o_dim[None, :]
    tl.store(p_grad, (acc * scaling).to(GRAD_Q.dtype.element_ty), mask=m_row[:, None] & m_dim)
    if GRAD_SCALE is not None:
        tl.store(GRAD_SCALE + row, mean.to(GRAD_SCALE.dtype.element_ty), mask=m_row)


@triton.jit
def _take_whole_bins(
    b_q,
    b_do,
    K,
    V,
    k_row,
    v_row,
    scale,
    LIST,
    p_words,
    seeing,
    steps,
    width,
    log_sum,
    factor,
    delta,
    acc,
    mean,
    LEVEL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over tiles of one or two entries, of whose bins a row keeps all keys or none: the forward pass has the same.

    steps: tiles, from the first entry on.
    width: log2 of the bins' keys, LEVEL or, if that fills a tile, more.
    """
    ENTRY: tl.constexpr = min(TILE, max(32, 1 << LEVEL))
    HALVES: tl.constexpr = TILE // ENTRY  # entries of a tile: left and right, which are the same if there is one
    BIN: tl.constexpr = min(TILE, 1 << LEVEL)
    BINS: tl.constexpr = TILE // BIN
    if BIN < TILE:
        width = width * 0 + LEVEL
    unit = tl.maximum(width, 5)
    left, right = tile_starts(LIST, 0, steps, unit, ENTRY, HALVES)
    next_left, next_right = tile_starts(LIST, 1, steps, unit, ENTRY, HALVES)
    left_word = tl.load(p_words + (left >> width >> 5), mask=seeing, other=0)
    right_word = tl.load(p_words + (right >> width >> 5), mask=seeing, other=0)
    for step in range(0, steps):
        o_key = keys_of_tile(left, right, ENTRY, HALVES)
        keep = kept_bins(left, right, left_word, right_word, width, BINS, HALVES)
        # What a step needs comes one step early, and the bins of its words two, so that no step waits for them.
        left_word = tl.load(p_words + (next_left >> width >> 5), mask=seeing, other=0)
        right_word = tl.load(p_words + (next_right >> width >> 5), mask=seeing, other=0)
        left, right = tile_starts(LIST, step + 1, steps, unit, ENTRY, HALVES)
        next_left, next_right = tile_starts(LIST, step + 2, steps, unit, ENTRY, HALVES)
        b_k = load_rows(K, o_key, k_row, HEAD_DIM, HEAD_PADDED)
        b_v = load_rows(V, o_key, v_row, VALUE_DIM, VALUE_PADDED)
        products = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        weights = weights_of_bins(products, keep, log_sum, scale)
        grad_weights = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        acc = _add_keys(weights, grad_weights, b_k, factor, delta, acc, PRECISION)
        if HAS_MEAN:
            mean += tl.sum(weights * grad_weights, 1)
    return acc, mean


@triton.jit
def _add_keys(weights, grad_weights, b_k, factor, delta, acc, PRECISION: tl.constexpr):
    """``acc`` plus the keys of a tile times the gradients of their scores."""
    grad_scores = weights * (grad_weights * factor[:, None] - delta[:, None])
    return acc + tl.dot(grad_scores.to(b_k.dtype), b_k, input_precision=PRECISION)
