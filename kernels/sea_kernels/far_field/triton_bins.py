"""Forward pass of the far field over the bins that are pooled as a whole.

All rows of a head share them, so that a program takes as many rows as fill the matrix units, and not just the few whose
lists agree. The walk over those lists goes on from what this pass leaves.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import aligned_level, cdiv, item_span, row_span
from ..triton_wide_lists import WIDE_TILE_BYTES, rows_of_level
from .triton_pool import Pool
from .triton_walk import TILE, Walk, load_columns

WIDE_TILE = 64  # bins at a time if their number allows it, and rows have at most WIDE_TILE_BYTES


def attend_to_bins(walk: Walk, bins: Pool, output: Tensor, log_sums: Tensor) -> None:
    """Write attention of every row to its unsplit bins, and log2 of its sum of exponentials, as far as rows have any.

    A row whose bins lie within runs of the second look gets none here: the lists say which of them it keeps.

    Args:
        walk: of the call.
        bins: the pooled bins of all widths.
        output: ``[N, H, T, E]``, contiguous, 0 where a row has no bins.
        log_sums: float32 ``[N, H, T]``, -1e30 where a row has no bins.
    """
    rows = walk.rows_per_program()
    wide = walk.row_bytes <= WIDE_TILE_BYTES and walk.bins.num_bins % WIDE_TILE == 0
    _bins_kernel[(cdiv(walk.num_queries, rows), walk.batch * walk.heads)](
        walk.query,
        output,
        log_sums,
        walk.bits,
        *bins,
        walk.spans,
        *walk.query.stride()[:3],
        walk.heads,
        walk.num_queries,
        walk.num_keys,
        walk.levels,
        walk.scaling,
        **walk.sizes(),
        ROWS=rows,
        TILE=WIDE_TILE if wide else TILE,
        **_launch_config(walk, wide),
    )


def _launch_config(walk: Walk, wide: bool) -> dict:
    """Launch parameters, for tiles of 64 bins such that four programs share a multiprocessor."""
    if wide and walk.query.itemsize == 2:
        return {"num_warps": 4, "num_stages": 2, "maxnreg": 128}
    return {"num_warps": 4, "num_stages": 3}


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "scaling"])
def _bins_kernel(
    Q,
    OUT,
    LOG_SUM,
    BITS,
    BIN_K,
    BIN_V,
    BIN_OFFSET,
    SPANS,
    q_item,
    q_head,
    q_row,
    heads,
    num_queries,
    num_keys,
    num_levels,
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
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    FIRST_LEVEL: tl.constexpr = WIDTH_LEVEL + 1 if LOOKS_TWICE else 0
    HALVES: tl.constexpr = TILE // 32
    item_head = tl.program_id(1).to(tl.int64)
    item, head = item_head // heads, item_head % heads
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)  # the longest come first
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    m_row, o_tile = rows < num_queries, tl.arange(0, TILE)
    b_q = load_columns(Q + item * q_item + head * q_head, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_PADDED], tl.float32)

    row = item_head * num_queries + rows
    p_words = BITS + row * (NUM_BINS // 32)
    low = tl.maximum(tl.min(tl.where(length > 0, level, 31)), FIRST_LEVEL)
    # Counts from 0, since Triton finds no wide loads where the first step is a reduction's result.
    for index in range(0, tl.max(level) + 1 - low):
        current = low + index
        # Bins with keys of the rows of this width. Not by their level, whose loop no layout of the words gets past.
        own = tl.where(rows_of_level(length, current, NUM_BINS), (length + (1 << current) - 1) >> current, 0)
        place = item_head * num_levels + current
        p_k, p_v = BIN_K + place * (NUM_BINS * HEAD_DIM), BIN_V + place * (NUM_BINS * VALUE_DIM)
        p_offset = BIN_OFFSET + place * NUM_BINS
        left, right = tl.load(p_words, mask=m_row, other=0), tl.load(p_words + HALVES - 1, mask=m_row, other=0)
        tiles = (tl.max(own) + TILE - 1) // TILE
        for step in range(0, tiles):
            bin_ = step * TILE + o_tile
            b_k = load_columns(p_k, bin_, bin_ >= 0, HEAD_DIM, HEAD_DIM, HEAD_PADDED)  # [TILE, HEAD]
            b_v = load_columns(p_v, bin_, bin_ >= 0, VALUE_DIM, VALUE_DIM, VALUE_PADDED)  # [TILE, VALUE]
            scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scaling + tl.load(p_offset + bin_)[None, :]
            left, right = _left_out(left, step * TILE, own), _left_out(right, (step + 1) * TILE - 32, own)
            far = tl.where((o_tile < 32)[None, :], left[:, None], right[:, None]) & (1 << (o_tile & 31))[None, :]
            # Words come a step early, so that no step waits for them.
            p_next = p_words + tl.minimum(step + 1, tiles - 1) * HALVES
            left, right = tl.load(p_next, mask=m_row, other=0), tl.load(p_next + HALVES - 1, mask=m_row, other=0)
            scores = tl.where(far == 0, scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores * LOG2E - (new_highest * LOG2E)[:, None])
            rescale = tl.exp2((highest - new_highest) * LOG2E)
            total = total * rescale + tl.sum(weights, 1)
            acc = acc * rescale[:, None] + tl.dot(weights.to(b_v.dtype), b_v, input_precision=PRECISION)
            highest = new_highest

    some = tl.where(total == 0.0, 1.0, total)
    o_value = tl.arange(0, VALUE_PADDED)
    m_out = m_row[:, None] & (o_value < VALUE_DIM)[None, :]
    tl.store(OUT + row[:, None] * VALUE_DIM + o_value[None, :], (acc / some[:, None]).to(OUT.dtype.element_ty), m_out)
    tl.store(LOG_SUM + row, tl.where(total == 0.0, -1e30, highest * LOG2E + tl.log2(some)), mask=m_row)


@triton.jit
def _left_out(word, first, own):
    """Bits of the bins from ``first`` on that are kept, or that are not among the ``own`` bins of a row. [ROWS]"""
    there = own - first
    return word | tl.where(there < 32, -1 << tl.minimum(tl.maximum(there, 0), 31), 0)
