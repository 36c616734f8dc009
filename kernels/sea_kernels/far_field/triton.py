"""Triton form of the far field (forward).

Pooled keys and values of all aligned bins and of the second look's runs are computed once per query head. A row's
running softmax begins with the bins of its width that are not split (``triton_pooled_bins.py``). After one look, the
same program goes on with the keys of the bins that it keeps (``triton_wide_rows.py``). After two, the bins have a pass
of their own (``triton_bins.py``); then a block of 16 rows walks the entries that its rows keep (see
``triton_entries.py``) and the runs inside their coarse bins that they do not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks import BinMask, RunMask
from ..triton_common import aligned_level, item_span, on_device, row_span, with_dense_rows
from ..triton_wide_lists import WideLists, lists_of_both_passes
from ..triton_wide_rows import attend_in_bins
from .triton_bins import attend_to_bins
from .triton_pool import Pool
from .triton_walk import Walk, accumulate, inside_runs, near_keys, sorted_entries, unsplit_bins, window_begin


def far_field_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: BinMask | RunMask,
    coarse: BinMask | None,
    *,
    centre: Tensor,
    causal: bool,
    scaling: float,
    attention_mask: Tensor | None,
    for_backward: bool = False,
) -> tuple[Tensor, Tensor, Pool, WideLists | None]:
    """See :func:`sea_kernels.far_field_attention`. No gradients; a run mask comes without a window before its run.

    Returns:
        The result, and for the backward pass float32 ``[N, H, T]``, log2 of each row's sum of exponentials, the pooled
        bins, and, if ``for_backward`` asks for them, the lists that it walks as well, if there are any.
    """
    query, key, value = with_dense_rows(query), with_dense_rows(key), with_dense_rows(value)
    walk = Walk(query, key, value, kept, coarse, centre, causal, scaling, attention_mask)
    rows = walk.batch, walk.heads, walk.num_queries
    output = query.new_empty(*rows, walk.value_dim)
    log_sums = torch.empty(rows, dtype=torch.float32, device=query.device)
    with on_device(query):
        bins = walk.pooled_bins()
        if not walk.looks_twice:
            place = {"causal": causal, "spans": walk.spans}
            lists = lists_of_both_passes(query, key, value, kept, **place) if for_backward else None
            place |= {"scaling": scaling, "pooled": bins, "lists": lists}
            attend_in_bins(query, key, value, kept, output, log_sums, **place)
            return output, log_sums, bins, lists
        pools = [bins, *walk.pooled_runs()]
        attend_to_bins(walk, bins, output, log_sums)
        for near, inside in walk.launches():
            _far_field_kernel[(near.meta.shape[1], walk.batch * walk.heads)](
                query,
                key,
                value,
                output,
                log_sums,
                *walk.arguments(near, inside, pools),
                **walk.sizes(),
                **walk.list_sizes(),
                num_warps=1,
                num_stages=2,
                maxnreg=168 if query.itemsize == 2 else None,  # as in the second look
            )
    return output, log_sums, bins, None


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_block", "num_levels", "num_runs", "stride", "scale"])
def _far_field_kernel(
    Q,
    K,
    V,
    OUT,
    LOG_SUM,
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
    o_dim, o_value, o_tile = tl.arange(0, HEAD_PADDED), tl.arange(0, VALUE_PADDED), tl.arange(0, TILE)
    m_dim, m_value = (o_dim < HEAD_DIM)[:, None], (o_value < VALUE_DIM)[None, :]
    p_q = Q + item * q_item + head * q_head + rows.to(tl.int64)[:, None] * q_row + o_dim[None, :]
    b_q = tl.load(p_q, mask=m_row[:, None] & (o_dim < HEAD_DIM)[None, :], other=0.0)  # [ROWS, HEAD]
    p_sum = LOG_SUM + item_head * num_queries + rows
    p_out = OUT + (item_head * num_queries + rows)[:, None] * VALUE_DIM + o_value[None, :]
    highest = tl.load(p_sum, mask=m_row, other=-1e30)  # what the rows have of their bins
    total = tl.where(highest > -1e29, 1.0, 0.0)
    acc = tl.load(p_out, mask=m_row[:, None] & m_value, other=0.0).to(tl.float32)  # [ROWS, VALUE]

    # The keys that rows keep.
    K += item * k_item + (head // heads_per_group) * k_head + first.to(tl.int64) * k_row
    V += item * v_item + (head // heads_per_group) * v_head + first.to(tl.int64) * v_row
    place = item_head * tl.num_programs(0) + block
    ENTRIES += place * CAPACITY
    count = tl.load(META + place * 2)
    width = tl.load(META + place * 2 + 1)  # log2 of an entry's keys
    for step in range(0, ((count << width) + TILE - 1) // TILE):
        o_key, keep = near_keys(ENTRIES, count, width, step, length, ROWS, TILE)
        m_key = o_key < real
        p_k = K + o_key.to(tl.int64)[None, :] * k_row + o_dim[:, None]
        b_k = tl.load(p_k, mask=m_key[None, :] & m_dim, other=0.0)  # [HEAD, TILE]
        p_v = V + o_key.to(tl.int64)[:, None] * v_row + o_value[None, :]
        b_v = tl.load(p_v, mask=m_key[:, None] & m_value, other=0.0)  # [TILE, VALUE]
        scores = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        highest, total, acc = accumulate(scores, keep, b_v, highest, total, acc, PRECISION)

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
        m_run = run < num_runs
        p_k = RUN_K + run.to(tl.int64)[None, :] * HEAD_DIM + o_dim[:, None]
        b_k = tl.load(p_k, mask=m_run[None, :] & m_dim, other=0.0)
        p_v = RUN_V + run.to(tl.int64)[:, None] * VALUE_DIM + o_value[None, :]
        b_v = tl.load(p_v, mask=m_run[:, None] & m_value, other=0.0)
        offset = tl.load(RUN_OFFSET + run, mask=m_run, other=0.0) * LOG2E
        scores = tl.dot(b_q, b_k, input_precision=PRECISION) * scale + offset[None, :]
        highest, total, acc = accumulate(scores, far, b_v, highest, total, acc, PRECISION)

    # Bins within runs: the list says which of them a row keeps.
    low = tl.min(tl.where(length > 0, level, 31))
    longest = tl.max(length)
    BIN_K += item_head * num_levels * (NUM_BINS * HEAD_DIM)
    BIN_V += item_head * num_levels * (NUM_BINS * VALUE_DIM)
    BIN_OFFSET += item_head * num_levels * NUM_BINS
    p_word = BITS + (item_head * num_queries + rows) * (NUM_BINS // 32)
    for current in range(low, tl.minimum(tl.max(level), WIDTH_LEVEL) + 1):
        m_level = (length > 0) & (level == current)
        used = tl.minimum((longest + (1 << current) - 1) >> current, NUM_BINS)
        for word in range(0, (used + 31) // 32):
            far = unsplit_bins(
                p_word, ENTRIES, count, word, current, m_level, length, begin,
                WIDTH, WIDTH_LEVEL, SEARCH_STEPS, ROWS, TILE,
            )  # fmt: skip
            bin_ = current * NUM_BINS + word * TILE + o_tile
            b_k = tl.load(BIN_K + bin_[None, :] * HEAD_DIM + o_dim[:, None], mask=m_dim, other=0.0)
            b_v = tl.load(BIN_V + bin_[:, None] * VALUE_DIM + o_value[None, :], mask=m_value, other=0.0)
            offset = tl.load(BIN_OFFSET + bin_) * LOG2E
            scores = tl.dot(b_q, b_k, input_precision=PRECISION) * scale + offset[None, :]
            highest, total, acc = accumulate(scores, far, b_v, highest, total, acc, PRECISION)

    total = tl.where(total == 0.0, 1.0, total)
    tl.store(p_out, (acc / total[:, None]).to(OUT.dtype.element_ty), mask=m_row[:, None] & m_value)
    tl.store(p_sum, highest + tl.log2(total), mask=m_row)
