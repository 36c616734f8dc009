"""What the kernels share that sum over rows: each takes a tile of pooled runs or bins and walks the rows below it.

What a row takes is read from its masks. A tile holds as many runs or bins as a word has bits, or two words, so that
these say it of the whole tile.
"""

import triton
import triton.language as tl

from ..triton_wide_lists import load_tile


@triton.jit
def rows_below(begin, num_queries, num_keys, first, real, CAUSAL: tl.constexpr):
    """First and last (exclusive) of the rows that see the key at position ``begin``."""
    offset = first - (num_keys - num_queries)
    begin_row = tl.maximum(offset + begin, 0) if CAUSAL else first
    end_row = tl.minimum(offset + real, num_queries)
    return begin_row, tl.where(begin < real, end_row, 0)


@triton.jit
def kept_runs(STARTS, row, m_row, first_run, WIDTH: tl.constexpr, SLOTS: tl.constexpr):
    """Bit i says whether a row keeps run ``first_run + i``, of 32, as one of its starts. int32 [ROWS]"""
    o_slot = tl.arange(0, 16)
    word = tl.zeros_like(m_row.to(tl.int32))
    for slot in range(0, SLOTS, 16):
        m_slot = m_row[:, None] & (slot + o_slot < SLOTS)[None, :]
        start = tl.load(STARTS + row[:, None] * SLOTS + slot + o_slot[None, :], mask=m_slot, other=-1)
        run = start // WIDTH - first_run
        m_run = (start >= 0) & (run >= 0) & (run < 32)
        word += tl.sum(tl.where(m_run, 1 << (run & 31), 0), 1)
    return word


@triton.jit
def bits_of(word, index):
    """Bit ``index`` (modulo 32) of every row's word. [TILE, ROWS]"""
    return ((word[None, :] >> (index & 31)) & 1) != 0


@triton.jit
def add_rows(
    b_k,
    b_v,
    offset,
    take,
    Q,
    GRAD_OUT,
    log_sum,
    delta,
    rows,
    m_row,
    q_row,
    g_row,
    scaling,
    grad_k,
    grad_v,
    grad_offset,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add some rows' gradients to a tile's pooled keys (without the factor ``scaling``), values and offsets.

    log_sum, delta: of the rows. [ROWS]
    take: which rows attend to which of the tile. [TILE, ROWS]
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    b_q = load_tile(Q, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)  # [ROWS, HEAD]
    b_do = load_tile(GRAD_OUT, rows, m_row, g_row, VALUE_DIM, VALUE_PADDED)  # [ROWS, VALUE]
    scores = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * (scaling * LOG2E) + (offset * LOG2E)[:, None]
    weights = tl.exp2(tl.where(take, scores - log_sum[None, :], float("-inf")))  # [TILE, ROWS]
    grad = weights * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - delta[None, :])
    grad_k += tl.dot(grad.to(b_q.dtype), b_q, input_precision=PRECISION)
    grad_v += tl.dot(weights.to(b_do.dtype), b_do, input_precision=PRECISION)
    return grad_k, grad_v, grad_offset + tl.sum(grad, 1)
