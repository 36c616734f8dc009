"""Gradient of the far field to the query after two looks, as far as it comes from bins that are pooled as a whole.

What the rows have of other things joins the sum later. After one look the kernel that goes on begins with the bins.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import aligned_level, cdiv, item_span, row_span
from ..triton_pooled_bins_backward import add_pooled_bins
from .triton_pool import Pool
from .triton_walk import Walk, load_columns


def differentiate_at_bins(
    walk: Walk, bins: Pool, output: Tensor, log_sums: Tensor, grad_output: Tensor, delta: Tensor, so_far: Tensor
) -> None:
    """Write every row's grad_output . output, and its gradient from the unsplit bins without the factor ``scaling``.

    A row whose bins lie within runs of the second look gets none here, as in the forward pass.

    Args:
        walk: of the call.
        bins: the pooled bins of all widths.
        output: ``[N, H, T, E]``, contiguous, of the forward pass.
        log_sums: float32 ``[N, H, T]``, contiguous, log2 of each row's sum of exponentials.
        grad_output: like output, with contiguous rows.
        delta: float32 ``[N, H, T]``, contiguous.
        so_far: float32 ``[N, H, T, D]``, contiguous, 0 where a row has no bins.
    """
    rows = walk.rows_per_program()
    _bins_gradient_kernel[(cdiv(walk.num_queries, rows), walk.batch * walk.heads)](
        walk.query,
        output,
        grad_output,
        log_sums,
        delta,
        so_far,
        walk.bits,
        *bins,
        walk.spans,
        *walk.query.stride()[:3],
        *grad_output.stride()[:3],
        walk.heads,
        walk.num_queries,
        walk.num_keys,
        walk.levels,
        walk.scaling,
        **walk.sizes(),
        ROWS=rows,
        num_warps=4,
        num_stages=3,
    )


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "scaling"])
def _bins_gradient_kernel(
    Q,
    OUT,
    GRAD_OUT,
    LOG_SUM,
    DELTA,
    SO_FAR,
    BITS,
    BIN_K,
    BIN_V,
    BIN_OFFSET,
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
):
    item_head = tl.program_id(1).to(tl.int64)
    item, head = item_head // heads, item_head % heads
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    m_row, o_dim = rows < num_queries, tl.arange(0, HEAD_PADDED)
    row = item_head * num_queries + rows
    b_q = load_columns(Q + item * q_item + head * q_head, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)
    b_do = load_columns(GRAD_OUT + item * g_item + head * g_head, rows, m_row, g_row, VALUE_DIM, VALUE_PADDED)
    b_out = load_columns(OUT, row, m_row, VALUE_DIM, VALUE_DIM, VALUE_PADDED)
    delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(DELTA + row, delta, mask=m_row)
    log_sum = tl.load(LOG_SUM + row, mask=m_row, other=0.0)
    acc = tl.zeros([ROWS, HEAD_PADDED], tl.float32)

    bins = item_head * num_levels * NUM_BINS
    acc = add_pooled_bins(
        b_q, b_do, BIN_K + bins * HEAD_DIM, BIN_V + bins * VALUE_DIM, BIN_OFFSET + bins,
        BITS + row * (NUM_BINS // 32), length > 0, length, level, log_sum, delta, acc, scaling,
        WIDTH_LEVEL + 1, HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED, NUM_BINS, PRECISION,
    )  # fmt: skip
    p_far = SO_FAR + row[:, None] * HEAD_DIM + o_dim[None, :]
    tl.store(p_far, acc, mask=m_row[:, None] & (o_dim < HEAD_DIM)[None, :])
