"""Forward pass of the far field over the bins that are pooled as a whole.

All rows of a head share them, so that a program takes as many rows as fill the matrix units, and not just the few whose
lists agree. The walk over those lists goes on from what this pass leaves.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import aligned_level, cdiv, item_span, row_span
from .triton_pool import Pool
from .triton_walk import LOG2E, TILE, Walk, accumulate, load_columns


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
        walk.scaling * LOG2E,
        **walk.sizes(),
        ROWS=rows,
        TILE=TILE,
        num_warps=4,
        num_stages=3,
    )


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "scale"])
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
    scale,
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
    item_head = tl.program_id(1).to(tl.int64)
    item, head = item_head // heads, item_head % heads
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    used = (length + (1 << level) - 1) >> level  # bins that hold keys, 0 in padding rows
    m_row, o_tile = rows < num_queries, tl.arange(0, TILE)
    b_q = load_columns(Q + item * q_item + head * q_head, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_PADDED], tl.float32)

    # Bins of successive widths follow one another: one loop takes the words of all widths of the block. It counts from
    # 0, since Triton finds no wide loads where the first step is a reduction's result.
    WORDS: tl.constexpr = NUM_BINS // TILE
    low = tl.maximum(tl.min(tl.where(length > 0, level, 31)), FIRST_LEVEL)
    high = tl.max(level)
    most = tl.max(tl.where(level == high, used, 0))
    row = item_head * num_queries + rows
    BIN_K += (item_head * num_levels + low) * (NUM_BINS * HEAD_DIM)
    BIN_V += (item_head * num_levels + low) * (NUM_BINS * VALUE_DIM)
    BIN_OFFSET += (item_head * num_levels + low) * NUM_BINS
    for step in range(0, (high - low) * WORDS + (most + TILE - 1) // TILE):
        own = tl.where(level == low + step // WORDS, used, 0)
        word = step % WORDS
        kept = tl.load(BITS + row * WORDS + word, mask=own > 0, other=0)
        bin_ = step * TILE + o_tile
        b_k = load_columns(BIN_K, bin_, bin_ >= 0, HEAD_DIM, HEAD_DIM, HEAD_PADDED)  # [TILE, HEAD]
        b_v = load_columns(BIN_V, bin_, bin_ >= 0, VALUE_DIM, VALUE_DIM, VALUE_PADDED)  # [TILE, VALUE]
        offset = tl.load(BIN_OFFSET + bin_) * LOG2E
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale + offset[None, :]
        far = ((kept[:, None] >> o_tile[None, :]) & 1) == 0
        far = far & (o_tile[None, :] < (own - word * TILE)[:, None])
        highest, total, acc = accumulate(scores, far, b_v, highest, total, acc, PRECISION)

    total = tl.where(total == 0.0, 1.0, total)
    o_value = tl.arange(0, VALUE_PADDED)
    m_out = m_row[:, None] & (o_value < VALUE_DIM)[None, :]
    tl.store(OUT + row[:, None] * VALUE_DIM + o_value[None, :], (acc / total[:, None]).to(OUT.dtype.element_ty), m_out)
    tl.store(LOG_SUM + row, highest + tl.log2(total), mask=m_row)
