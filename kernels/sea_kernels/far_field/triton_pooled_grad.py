"""Gradients of the far field to pooled keys, pooled values and offsets, which then flow through the pooling."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import (
    aligned_level,
    cdiv,
    first_of_step,
    item_span,
    load_row_numbers,
    row_span,
    split_steps,
)
from ..triton_wide_lists import WIDE_TILE, WIDE_TILE_BYTES
from .triton_pool import Pool
from .triton_rows import add_rows, bits_of, kept_runs, rows_below
from .triton_walk import TILE, Walk, load_columns, window_begin

SPLIT_ROWS = 8192  # rows of the input for each part that a walk is cut into
MOST_SPLITS = 8
BLOCKS = 8  # of rows whose bits are looked at together, so that a walk over rows without a part is short


def pooled_gradients(walk: Walk, pools: list[Pool], grad_output: Tensor, log_sums: Tensor, delta: Tensor) -> list[Pool]:
    """Gradients to ``pools`` in float32, zeros where no row takes a bin or run."""
    rows = walk.row_arguments(grad_output, log_sums, delta)
    grads = [_bin_gradients(walk, pools[0], rows)]
    if walk.looks_twice:
        grads.append(_run_gradients(walk, pools[1], rows))
    return grads


def _bin_gradients(walk: Walk, bins: Pool, rows: tuple) -> Pool:
    splits = min(MOST_SPLITS, cdiv(walk.num_queries, SPLIT_ROWS))
    grads, sizes = _empty_like(bins, splits), walk.sizes() | walk.row_sizes()
    if not walk.looks_twice and walk.bins.num_bins % WIDE_TILE == 0 and walk.row_bytes <= WIDE_TILE_BYTES:
        sizes |= {"TILE": WIDE_TILE, "maxnreg": None}  # as many as the matrix units want
    tiles = bins.offset.shape[-1] // sizes["TILE"]
    _bin_gradients_kernel[(tiles, walk.batch * walk.heads, splits)](*bins, *grads, *rows, **sizes)
    return Pool(*(grad.sum(0) if splits > 1 else grad[0] for grad in grads))


def _run_gradients(walk: Walk, runs: Pool, rows: tuple) -> Pool:
    grads = _empty_like(runs, 1)
    _run_gradients_kernel[(cdiv(walk.num_runs, TILE), walk.batch * walk.heads)](
        *runs, *grads, walk.num_runs, *rows, **walk.sizes(), **walk.row_sizes(), BLOCKS=BLOCKS
    )
    return Pool(*(grad[0] for grad in grads))


def _empty_like(pool: Pool, parts: int) -> Pool:
    return Pool(*(torch.empty(parts, *x.shape, dtype=torch.float32, device=x.device) for x in pool))


@triton.jit
def _store_gradients(
    GRAD_K,
    GRAD_V,
    GRAD_OFFSET,
    place,
    m_place,
    grad_k,
    grad_v,
    grad_offset,
    scaling,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
):
    o_dim, o_value = tl.arange(0, HEAD_PADDED), tl.arange(0, VALUE_PADDED)
    p_grad = GRAD_K + place[:, None] * HEAD_DIM + o_dim[None, :]
    tl.store(p_grad, grad_k * scaling, mask=m_place[:, None] & (o_dim < HEAD_DIM)[None, :])
    p_grad = GRAD_V + place[:, None] * VALUE_DIM + o_value[None, :]
    tl.store(p_grad, grad_v, mask=m_place[:, None] & (o_value < VALUE_DIM)[None, :])
    tl.store(GRAD_OFFSET + place, grad_offset, mask=m_place)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "stride", "scaling"])
def _bin_gradients_kernel(
    BIN_K,
    BIN_V,
    BIN_OFFSET,
    GRAD_K,
    GRAD_V,
    GRAD_OFFSET,
    Q,
    GRAD_OUT,
    LOG_SUM,
    DELTA,
    BITS,
    STARTS,
    SPANS,
    q_item,
    q_head,
    q_row,
    g_item,
    g_head,
    g_row,
    heads,
    num_queries,
    num_keys,
    num_levels,
    stride,
    scaling,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_LEVEL: tl.constexpr,
    CAUSAL: tl.constexpr,
    LOOKS_TWICE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    WORDS: tl.constexpr = NUM_BINS // 32
    TILES: tl.constexpr = NUM_BINS // TILE
    current, tile = num_levels - 1 - tl.program_id(0) // TILES, tl.program_id(0) % TILES  # the longest walks first
    item_head = tl.program_id(1).to(tl.int64)
    item, head = item_head // heads, item_head % heads
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    o_tile = tl.arange(0, TILE)
    o_bin = tile * TILE + o_tile
    start = o_bin << current
    begin_key = (tile * TILE) << current
    first_run = begin_key // WIDTH
    place = (item_head * num_levels + current) * NUM_BINS + o_bin
    m_bin = o_bin >= 0
    b_k = load_columns(BIN_K, place, m_bin, HEAD_DIM, HEAD_DIM, HEAD_PADDED)
    b_v = load_columns(BIN_V, place, m_bin, VALUE_DIM, VALUE_DIM, VALUE_PADDED)
    offset = tl.load(BIN_OFFSET + place)
    grad_k = tl.zeros([TILE, HEAD_PADDED], tl.float32)
    grad_v = tl.zeros([TILE, VALUE_PADDED], tl.float32)
    grad_offset = tl.zeros([TILE], tl.float32)

    # Causal rows of one level lie side by side; bidirectional rows of an item are all of one level.
    shortest = tl.where(current > 0, NUM_BINS << tl.maximum(current - 1, 0), 0)
    if CAUSAL:
        begin_row, end_row = rows_below(tl.maximum(begin_key, shortest), num_queries, num_keys, first, real, CAUSAL)
        last_row, _ = rows_below(NUM_BINS << current, num_queries, num_keys, first, real, CAUSAL)
        end_row = tl.minimum(end_row, last_row)
    else:
        begin_row, end_row = rows_below(begin_key, num_queries, num_keys, first, real, CAUSAL)
        end_row = tl.where((real > shortest) & (real <= (NUM_BINS << current)), end_row, 0)
    part = tl.cdiv(tl.cdiv(tl.maximum(end_row - begin_row, 0), tl.num_programs(2)), ROWS) * ROWS
    begin_row += tl.program_id(2) * part
    end_row = tl.minimum(begin_row + part, end_row)
    # Later rows see all bins of the tile: after one look their bits tell the rest.
    last_key = ((tile + 1) * TILE - 1) << current
    full_row, _ = rows_below(last_key, num_queries, num_keys, first, real, CAUSAL)
    full_row = tl.where(LOOKS_TWICE | (last_key >= real), end_row, full_row)
    before, full_steps, after = split_steps(begin_row, full_row, end_row, ROWS)
    row = item_head * num_queries
    for masked in tl.static_range(2):
        for step in range(0, before + after if masked else full_steps):
            rows = first_of_step(begin_row, step, before, full_steps, ROWS, masked) + tl.arange(0, ROWS)
            m_row = rows < end_row if masked else None
            p_left = BITS + (row + rows) * WORDS + tile * (TILE // 32)
            p_right, p_log_sum, p_delta = p_left + (TILE // 32 - 1), LOG_SUM + row + rows, DELTA + row + rows
            left, right, log_sum, delta = load_row_numbers(p_left, p_right, p_log_sum, p_delta, m_row)
            words = tl.where((o_tile < 32)[:, None], left[None, :], right[None, :])
            far = (words & (1 << (o_bin & 31))[:, None]) == 0  # [TILE, ROWS]
            if masked:
                position, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
                if LOOKS_TWICE and current <= WIDTH_LEVEL:  # bins within runs are not split: what does the row keep?
                    begin = window_begin(position, length, stride, WIDTH, HAS_WINDOW)
                    kept = kept_runs(STARTS, row + rows, m_row, first_run, WIDTH, SLOTS)
                    run = start // WIDTH
                    near = bits_of(kept, (run - first_run)[:, None]) | ((run * WIDTH)[:, None] >= begin[None, :])
                    far = near == 0
                far &= m_row[None, :] & (start[:, None] < length[None, :])
            grad_k, grad_v, grad_offset = add_rows(
                b_k, b_v, offset, far,
                Q + item * q_item + head * q_head, GRAD_OUT + item * g_item + head * g_head,
                log_sum, delta, rows, m_row, q_row, g_row, scaling,
                grad_k, grad_v, grad_offset, HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED, PRECISION,
            )  # fmt: skip
    place += tl.program_id(2).to(tl.int64) * tl.num_programs(1) * num_levels * NUM_BINS
    _store_gradients(
        GRAD_K, GRAD_V, GRAD_OFFSET, place, m_bin, grad_k, grad_v, grad_offset, scaling,
        HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED,
    )  # fmt: skip


@triton.jit
def _splitting_blocks(
    BITS,
    row_step,
    begin_key,
    num_queries,
    num_keys,
    first,
    real,
    num_levels,
    KEYS: tl.constexpr,
    WIDTH_LEVEL: tl.constexpr,
    NUM_BINS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Bit i says whether one of the i-th ``ROWS`` rows splits a bin that shares a key with a tile of ``KEYS`` keys."""
    rows = row_step + tl.arange(0, ROWS * BLOCKS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    m_row = (begin_key < length) & (level > WIDTH_LEVEL)
    begin_bin = begin_key >> level
    word = tl.load(BITS + rows * (NUM_BINS // 32) + (begin_bin >> 5), mask=m_row, other=0)
    count = tl.maximum(KEYS >> level, 1)  # bins of the tile, at most 16, whose bits lie in one word
    touched = (word >> (begin_bin & 31)) & ((1 << (count & 31)) - 1)
    touched = tl.max(tl.reshape((touched != 0).to(tl.int32), (BLOCKS, ROWS)), 1)
    return tl.sum(touched << tl.arange(0, BLOCKS))


@triton.jit(do_not_specialize=["num_runs", "num_queries", "num_keys", "num_levels", "stride", "scaling"])
def _run_gradients_kernel(
    RUN_K,
    RUN_V,
    RUN_OFFSET,
    GRAD_K,
    GRAD_V,
    GRAD_OFFSET,
    num_runs,
    Q,
    GRAD_OUT,
    LOG_SUM,
    DELTA,
    BITS,
    STARTS,
    SPANS,
    q_item,
    q_head,
    q_row,
    g_item,
    g_head,
    g_row,
    heads,
    num_queries,
    num_keys,
    num_levels,
    stride,
    scaling,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_LEVEL: tl.constexpr,
    CAUSAL: tl.constexpr,
    LOOKS_TWICE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    item_head = tl.program_id(1).to(tl.int64)
    item, head = item_head // heads, item_head % heads
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    first_run = tl.program_id(0) * TILE
    begin_key = first_run * WIDTH
    o_run = first_run + tl.arange(0, TILE)
    start = o_run * WIDTH
    m_run = o_run < num_runs
    place = item_head * num_runs + o_run
    b_k = load_columns(RUN_K, place, m_run, HEAD_DIM, HEAD_DIM, HEAD_PADDED)
    b_v = load_columns(RUN_V, place, m_run, VALUE_DIM, VALUE_DIM, VALUE_PADDED)
    offset = tl.load(RUN_OFFSET + place, mask=m_run, other=0.0)
    grad_k = tl.zeros([TILE, HEAD_PADDED], tl.float32)
    grad_v = tl.zeros([TILE, VALUE_PADDED], tl.float32)
    grad_offset = tl.zeros([TILE], tl.float32)
    SPLIT_KEYS: tl.constexpr = NUM_BINS * WIDTH  # rows of no more keys have bins that are not split
    begin_row, end_row = rows_below(begin_key, num_queries, num_keys, first, real, CAUSAL)
    if CAUSAL:
        split_row, _ = rows_below(SPLIT_KEYS, num_queries, num_keys, first, real, CAUSAL)
        begin_row = tl.maximum(begin_row, split_row)
    row = item_head * num_queries
    BITS += row * (NUM_BINS // 32)
    for row_step in range(begin_row, end_row, ROWS * BLOCKS):
        blocks = _splitting_blocks(
            BITS, row_step, begin_key, num_queries, num_keys, first, real, num_levels,
            TILE * WIDTH, WIDTH_LEVEL, NUM_BINS, ROWS, BLOCKS, CAUSAL,
        )  # fmt: skip
        for block in range(0, BLOCKS):
            if ((blocks >> block) & 1) != 0:
                rows = row_step + block * ROWS + tl.arange(0, ROWS)
                position, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
                level = aligned_level(length, num_levels, NUM_BINS)
                sees = (begin_key < length) & (level > WIDTH_LEVEL)
                word = tl.load(BITS + rows * (NUM_BINS // 32) + (begin_key >> level >> 5), mask=sees, other=0)
                end = tl.minimum(length, window_begin(position, length, stride, WIDTH, HAS_WINDOW))
                kept = kept_runs(STARTS, row + rows, sees, first_run, WIDTH, SLOTS)
                far = bits_of(word, start[:, None] >> level[None, :]) & (start[:, None] < end[None, :])
                far = far & (bits_of(kept, (o_run - first_run)[:, None]) == 0)
                log_sum = tl.load(LOG_SUM + row + rows, mask=sees, other=0.0)
                delta = tl.load(DELTA + row + rows, mask=sees, other=0.0)
                grad_k, grad_v, grad_offset = add_rows(
                    b_k, b_v, offset, far,
                    Q + item * q_item + head * q_head, GRAD_OUT + item * g_item + head * g_head,
                    log_sum, delta, rows, sees, q_row, g_row, scaling,
                    grad_k, grad_v, grad_offset, HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED, PRECISION,
                )  # fmt: skip
    _store_gradients(
        GRAD_K, GRAD_V, GRAD_OFFSET, place, m_run, grad_k, grad_v, grad_offset, scaling,
        HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED,
    )  # fmt: skip
