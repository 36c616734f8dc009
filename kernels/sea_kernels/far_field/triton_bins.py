"""Forward pass of the far field after two looks, over the bins that are pooled as a whole.

All rows of a head share them, so that a program takes as many rows as fill the matrix units, and not just the few whose
lists agree. The walk over those lists goes on from what this pass leaves. After one look the programs that walk the
kept keys have as many rows, and begin with these bins themselves.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import aligned_level, cdiv, item_span, row_span
from ..triton_pooled_bins import take_pooled_bins
from ..triton_wide_lists import WIDE_TILE, WIDE_TILE_BYTES
from .triton_pool import Pool
from .triton_walk import TILE, Walk, load_columns


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
    return {"num_warps": 4, "maxnreg": 128 if wide and walk.query.itemsize == 2 else None}


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
    item_head = tl.program_id(1).to(tl.int64)
    item, head = item_head // heads, item_head % heads
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)  # the longest come first
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    m_row = rows < num_queries
    b_q = load_columns(Q + item * q_item + head * q_head, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)
    row = item_head * num_queries + rows
    p_words = BITS + row * (NUM_BINS // 32)
    highest, total, acc = take_pooled_bins(
        b_q, BIN_K, BIN_V, BIN_OFFSET, item_head, num_levels, scaling, p_words, length > 0, length, level,
        WIDTH_LEVEL + 1, HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED, NUM_BINS, TILE, PRECISION,
    )  # fmt: skip

    some = tl.where(total == 0.0, 1.0, total)
    o_value = tl.arange(0, VALUE_PADDED)
    m_out = m_row[:, None] & (o_value < VALUE_DIM)[None, :]
    tl.store(OUT + row[:, None] * VALUE_DIM + o_value[None, :], (acc / some[:, None]).to(OUT.dtype.element_ty), m_out)
    tl.store(LOG_SUM + row, tl.where(total == 0.0, -1e30, highest + tl.log2(some)), mask=m_row)
