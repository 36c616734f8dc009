"""Gradient of the far field to the query, and what every backward kernel needs of a row: grad_output . output.

With the row's log-sum every weight p is known at once, and a pooled run is a key like any other: ``dq = scaling * sum p
(grad_output . v - delta) k``. The sum begins with the bins of a row's width that are not split and goes on as in the
forward pass: after one look with the keys of the bins that rows keep, in the same kernel
(``triton_wide_rows_backward.py``), after two with a block of 16 rows that walks its lists. The bins then have a kernel
of their own (``triton_bins_grad.py``). It leaves single precision, since the two sums may nearly cancel: with all its
weights a row's share of the keys' mean is 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import aligned_level, item_span, row_span
from ..triton_wide_lists import WideLists
from ..triton_wide_rows_backward import differentiate_queries_in_bins
from .triton_bins_grad import differentiate_at_bins
from .triton_pool import Pool
from .triton_walk import (
    Walk,
    add_gradient,
    inside_runs,
    load_columns,
    near_keys,
    sorted_entries,
    unsplit_bins,
    window_begin,
)


def query_gradient(
    walk: Walk, pools: list[Pool], lists: WideLists | None, output: Tensor, log_sums: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient ``[N, H, T, D]`` in query's dtype, and float32 ``[N, H, T]``: delta, grad_output . output.

    ``lists``: what the forward pass kept.
    """
    grad = torch.empty_like(walk.query, memory_format=torch.contiguous_format)
    delta = torch.empty_like(log_sums)
    if not walk.looks_twice:
        rows, keys = (walk.query, output, grad_output, log_sums, delta), (walk.key, walk.value, walk.kept)
        place = {"causal": walk.causal, "scaling": walk.scaling, "spans": walk.spans, "pooled": pools[0]}
        place["lists"] = lists
        differentiate_queries_in_bins(*rows, *keys, grad, **place)
        return grad, delta
    so_far = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
    differentiate_at_bins(walk, pools[0], output, log_sums, grad_output, delta, so_far)
    for near, inside in walk.launches():
        _query_gradient_kernel[(near.meta.shape[1], walk.batch * walk.heads)](
            walk.query,
            walk.key,
            walk.value,
            grad_output,
            log_sums,
            delta,
            so_far,
            grad,
            *grad_output.stride()[:3],
            walk.scaling,
            *walk.arguments(near, inside, pools),
            **walk.sizes(),
            **walk.list_sizes(),
            num_warps=max(1, min(4, walk.row_bytes // 128)),
            num_stages=2,
        )
    return grad, delta


@triton.jit(
    do_not_specialize=[
        "num_queries",
        "num_keys",
        "first_block",
        "num_levels",
        "num_runs",
        "stride",
        "scaling",
        "scale",
    ]
)
def _query_gradient_kernel(
    Q,
    K,
    V,
    GRAD_OUT,
    LOG_SUM,
    DELTA,
    SO_FAR,
    GRAD_Q,
    g_item,
    g_head,
    g_row,
    scaling,
    ENTRIES,
    META,
    INSIDE,
    INSIDE_META,
    BITS,
    BIN_K,
    BIN_V,
    BIN_OFFSET,
    RUN_K,
    RUN_V,
    RUN_OFFSET,
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
    heads,
    heads_per_group,
    num_queries,
    num_keys,
    first_block,
    num_levels,
    num_runs,
    stride,
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
    CAPACITY: tl.constexpr,
    INSIDE_CAPACITY: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    block, item_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    item, head = item_head // heads, item_head % heads
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = (first_block + block) * ROWS + tl.arange(0, ROWS)
    position, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    m_row = rows < num_queries
    o_dim, o_tile = tl.arange(0, HEAD_PADDED), tl.arange(0, TILE)
    b_q = load_columns(Q + item * q_item + head * q_head, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)
    b_do = load_columns(GRAD_OUT + item * g_item + head * g_head, rows, m_row, g_row, VALUE_DIM, VALUE_PADDED)
    row = item_head * num_queries + rows
    delta = tl.load(DELTA + row, mask=m_row, other=0.0)
    log_sum = tl.load(LOG_SUM + row, mask=m_row, other=0.0)
    acc = load_columns(SO_FAR, row, m_row, HEAD_DIM, HEAD_DIM, HEAD_PADDED)  # what the rows have of their bins

    # The keys that rows keep.
    K += item * k_item + (head // heads_per_group) * k_head + first.to(tl.int64) * k_row
    V += item * v_item + (head // heads_per_group) * v_head + first.to(tl.int64) * v_row
    place = item_head * tl.num_programs(0) + block
    ENTRIES += place * CAPACITY
    count = tl.load(META + place * 2)
    width = tl.load(META + place * 2 + 1)  # log2 of an entry's keys
    zeros = tl.zeros([TILE], tl.float32)
    for step in range(0, ((count << width) + TILE - 1) // TILE):
        o_key, keep = near_keys(ENTRIES, count, width, step, length, ROWS, TILE)
        b_k = load_columns(K, o_key, o_key < real, k_row, HEAD_DIM, HEAD_PADDED)
        b_v = load_columns(V, o_key, o_key < real, v_row, VALUE_DIM, VALUE_PADDED)
        acc = add_gradient(b_q, b_do, b_k, b_v, zeros, keep, log_sum, delta, acc, scale, PRECISION)

    # The runs in their coarse bins that rows do not keep.
    begin = window_begin(position, length, stride, WIDTH, HAS_WINDOW)
    count = sorted_entries(count, begin, length, WIDTH, HAS_WINDOW)
    RUN_K += item_head * num_runs * HEAD_DIM
    RUN_V += item_head * num_runs * VALUE_DIM
    RUN_OFFSET += item_head * num_runs
    INSIDE += place * INSIDE_CAPACITY
    m_split = (level > WIDTH_LEVEL) & (length > 0)
    end = tl.where(m_split, tl.minimum(length, begin), 0)
    inside = tl.where(tl.max(end) > 0, tl.load(INSIDE_META + place * 2), 0)
    unit = tl.maximum(tl.load(INSIDE_META + place * 2 + 1) - WIDTH_LEVEL, 0)  # log2 of an entry's runs
    for step in range(0, ((inside << unit) + TILE - 1) // TILE):
        run, far = inside_runs(INSIDE, inside, unit, ENTRIES, count, step, end, WIDTH, SEARCH_STEPS, ROWS, TILE)
        b_k = load_columns(RUN_K, run, run < num_runs, HEAD_DIM, HEAD_DIM, HEAD_PADDED)
        b_v = load_columns(RUN_V, run, run < num_runs, VALUE_DIM, VALUE_DIM, VALUE_PADDED)
        offset = tl.load(RUN_OFFSET + run, mask=run < num_runs, other=0.0) * LOG2E
        acc = add_gradient(b_q, b_do, b_k, b_v, offset, far, log_sum, delta, acc, scale, PRECISION)

    # Bins within runs: the list says which of them a row keeps.
    low = tl.min(tl.where(length > 0, level, 31))
    longest = tl.max(length)
    BIN_K += item_head * num_levels * (NUM_BINS * HEAD_DIM)
    BIN_V += item_head * num_levels * (NUM_BINS * VALUE_DIM)
    BIN_OFFSET += item_head * num_levels * NUM_BINS
    p_word = BITS + row * (NUM_BINS // 32)
    for current in range(low, tl.minimum(tl.max(level), WIDTH_LEVEL) + 1):
        m_level = (length > 0) & (level == current)
        used = tl.minimum((longest + (1 << current) - 1) >> current, NUM_BINS)
        for word in range(0, (used + 31) // 32):
            far = unsplit_bins(
                p_word, ENTRIES, count, word, current, m_level, length, begin,
                WIDTH, WIDTH_LEVEL, SEARCH_STEPS, ROWS, TILE,
            )  # fmt: skip
            bin_ = current * NUM_BINS + word * TILE + o_tile
            b_k = load_columns(BIN_K, bin_, bin_ >= 0, HEAD_DIM, HEAD_DIM, HEAD_PADDED)
            b_v = load_columns(BIN_V, bin_, bin_ >= 0, VALUE_DIM, VALUE_DIM, VALUE_PADDED)
            offset = tl.load(BIN_OFFSET + bin_) * LOG2E
            acc = add_gradient(b_q, b_do, b_k, b_v, offset, far, log_sum, delta, acc, scale, PRECISION)

    p_grad = GRAD_Q + row[:, None] * HEAD_DIM + o_dim[None, :]
    tl.store(p_grad, (acc * scaling).to(GRAD_Q.dtype.element_ty), mask=m_row[:, None] & (o_dim < HEAD_DIM)[None, :])
