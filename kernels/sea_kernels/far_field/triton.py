"""Triton form of the far field (forward).

Pooled keys and values of all aligned bins and of the second look's runs are computed once per query head. Then a block
of 16 rows walks three things with one running softmax: the entries that its rows keep (see ``triton_entries.py``), the
runs inside their coarse bins that they do not keep, and the K bins of their width outside of those.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks import BinMask, RunMask
from ..triton_common import aligned_level, count_levels, item_span, item_spans, on_device, row_span, with_dense_rows
from ..triton_entries import BLOCK_ROWS, EntryLists
from .triton_pool import pool

LOG2E = 1.4426950408889634
TILE = 32  # keys or runs at a time; also the bins of one word of a mask


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
) -> Tensor:
    """See :func:`sea_kernels.far_field_attention`. No gradients; a run mask comes without a window before its run."""
    batch, heads, num_queries, head_dim = query.shape
    num_keys, value_dim = value.shape[2:]
    query, key, value = with_dense_rows(query), with_dense_rows(key), with_dense_rows(value)
    output = query.new_empty(batch, heads, num_queries, value_dim)
    spans = item_spans(attention_mask)
    looks_twice = isinstance(kept, RunMask)
    bins = coarse if looks_twice else kept
    levels = count_levels(num_keys, bins.num_bins)
    width = kept.width if looks_twice else 1
    with on_device(query):
        places = [(bins.num_bins * levels, bins.num_bins, 0)]
        if looks_twice:
            places.append((triton.cdiv(num_keys, width), 0, width.bit_length() - 1))
        pools = [pool(key, value, centre, spans, *place) for place in places]
        near = EntryLists(kept, num_keys, causal, spans)
        inside = EntryLists(bins, num_keys, causal, spans, unit=width)
        for first_block, num_blocks in near.split(triton.cdiv(num_queries, BLOCK_ROWS), 8 * inside.capacity):
            near_entries = near.build(first_block, num_blocks)
            inside_entries = inside.build(first_block, num_blocks) if looks_twice else near_entries
            _far_field_kernel[(num_blocks, batch * heads)](
                query,
                key,
                value,
                output,
                near_entries.packed,
                near_entries.meta,
                inside_entries.packed,
                inside_entries.meta,
                bins.bits.contiguous(),
                *pools[0],
                *pools[-1],
                spans,
                *query.stride()[:3],
                *key.stride()[:3],
                *value.stride()[:3],
                heads,
                heads // key.shape[1],
                num_queries,
                num_keys,
                first_block,
                levels,
                pools[-1].offset.shape[-1],
                kept.stride if looks_twice else 1,
                scaling * LOG2E,
                HEAD_DIM=head_dim,
                VALUE_DIM=value_dim,
                HEAD_PADDED=max(16, triton.next_power_of_2(head_dim)),
                VALUE_PADDED=max(16, triton.next_power_of_2(value_dim)),
                CAPACITY=near.capacity,
                INSIDE_CAPACITY=inside.capacity if looks_twice else near.capacity,
                SEARCH_STEPS=near.capacity.bit_length(),
                NUM_BINS=bins.num_bins,
                WIDTH=width,
                WIDTH_LEVEL=width.bit_length() - 1,
                ROWS=BLOCK_ROWS,
                TILE=TILE,
                CAUSAL=causal,
                LOOKS_TWICE=looks_twice,
                HAS_WINDOW=looks_twice and kept.stride > 1,
                HAS_PADDING=spans is not None,
                PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
                num_warps=1,
                num_stages=2,
                maxnreg=168,  # as in the second look
            )
    return output


@triton.jit
def _kept_bits(ENTRIES, count, start, STEPS: tl.constexpr):
    """Row bits of the entry that begins at each ``start [TILE]`` (0 where none does), by bisection on the list."""
    low = start * 0
    high = low + count
    for _ in range(0, STEPS):
        middle = (low + high) // 2
        open_ = low < high
        smaller = (tl.load(ENTRIES + middle, mask=open_, other=0) >> 16).to(tl.int32) < start
        low = tl.where(open_ & smaller, middle + 1, low)
        high = tl.where(open_ & (smaller == 0), middle, high)
    entry = tl.load(ENTRIES + low, mask=low < count, other=-1)
    return tl.where((entry >> 16).to(tl.int32) == start, (entry & 0xFFFF).to(tl.int32), 0)


@triton.jit
def _accumulate(scores, keep, b_v, highest, total, acc, PRECISION: tl.constexpr):
    """One step of the running softmax."""
    scores = tl.where(keep, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_highest[:, None])
    rescale = tl.exp2(highest - new_highest)
    total = total * rescale + tl.sum(weights, 1)
    acc = acc * rescale[:, None] + tl.dot(weights.to(b_v.dtype), b_v, input_precision=PRECISION)
    return new_highest, total, acc


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_block", "num_levels", "num_runs", "stride", "scale"])
def _far_field_kernel(
    Q,
    K,
    V,
    OUT,
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
    CAPACITY: tl.constexpr,
    INSIDE_CAPACITY: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_LEVEL: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    LOOKS_TWICE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    block, item_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    item, head = item_head // heads, item_head % heads
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    o_row = tl.arange(0, ROWS)
    rows = (first_block + block) * ROWS + o_row
    position, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    m_row = rows < num_queries
    o_dim, o_value, o_tile = tl.arange(0, HEAD_PADDED), tl.arange(0, VALUE_PADDED), tl.arange(0, TILE)
    m_dim, m_value = (o_dim < HEAD_DIM)[:, None], (o_value < VALUE_DIM)[None, :]
    p_q = Q + item * q_item + head * q_head + rows.to(tl.int64)[:, None] * q_row + o_dim[None, :]
    b_q = tl.load(p_q, mask=m_row[:, None] & (o_dim < HEAD_DIM)[None, :], other=0.0)  # [ROWS, HEAD]
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_PADDED], tl.float32)

    # The keys that rows keep.
    K += item * k_item + (head // heads_per_group) * k_head + first.to(tl.int64) * k_row
    V += item * v_item + (head // heads_per_group) * v_head + first.to(tl.int64) * v_row
    place = item_head * tl.num_programs(0) + block
    ENTRIES += place * CAPACITY
    count = tl.load(META + place * 2)
    width = tl.load(META + place * 2 + 1)  # log2 of an entry's keys
    for step in range(0, ((count << width) + TILE - 1) // TILE):
        o_flat = step * TILE + o_tile
        entry = tl.load(ENTRIES + (o_flat >> width), mask=(o_flat >> width) < count, other=0)
        o_key = (entry >> 16).to(tl.int32) + (o_flat & ((1 << width) - 1))
        m_key = o_key < real
        p_k = K + o_key.to(tl.int64)[None, :] * k_row + o_dim[:, None]
        b_k = tl.load(p_k, mask=m_key[None, :] & m_dim, other=0.0)  # [HEAD, TILE]
        p_v = V + o_key.to(tl.int64)[:, None] * v_row + o_value[None, :]
        b_v = tl.load(p_v, mask=m_key[:, None] & m_value, other=0.0)  # [TILE, VALUE]
        keep = ((entry.to(tl.int32)[None, :] >> o_row[:, None]) & 1) != 0
        keep = keep & (o_key[None, :] < length[:, None])
        scores = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        highest, total, acc = _accumulate(scores, keep, b_v, highest, total, acc, PRECISION)

    # The runs in their coarse bins that rows do not keep.
    begin = length  # of the window that rows sharing an estimate have
    if LOOKS_TWICE:
        if HAS_WINDOW:
            begin = tl.where(length > 0, (position // stride * stride) // WIDTH * WIDTH, 2147483647)
            count -= (tl.max(length) + WIDTH - 1) // WIDTH - tl.min(
                begin
            ) // WIDTH  # its entries follow the sorted ones
            count = tl.where(tl.max(length) > 0, count, 0)
        RUN_K += item_head * num_runs * HEAD_DIM
        RUN_V += item_head * num_runs * VALUE_DIM
        RUN_OFFSET += item_head * num_runs
        INSIDE += place * INSIDE_CAPACITY
        inside = tl.load(INSIDE_META + place * 2)
        unit = tl.load(INSIDE_META + place * 2 + 1) - WIDTH_LEVEL  # log2 of an entry's runs
        m_split = (level > WIDTH_LEVEL) & (length > 0)
        inside = tl.where(tl.max(m_split.to(tl.int32)) > 0, inside, 0)
        for step in range(0, ((inside << unit) + TILE - 1) // TILE):
            o_flat = step * TILE + o_tile
            entry = tl.load(INSIDE + (o_flat >> unit), mask=(o_flat >> unit) < inside, other=0)
            run = ((entry >> 16).to(tl.int32) // WIDTH) + (o_flat & ((1 << unit) - 1))
            m_run = run < num_runs
            b_k = tl.load(
                RUN_K + run.to(tl.int64)[None, :] * HEAD_DIM + o_dim[:, None], mask=m_run[None, :] & m_dim, other=0.0
            )
            b_v = tl.load(
                RUN_V + run.to(tl.int64)[:, None] * VALUE_DIM + o_value[None, :],
                mask=m_run[:, None] & m_value,
                other=0.0,
            )
            offset = tl.load(RUN_OFFSET + run, mask=m_run, other=0.0) * LOG2E
            bits = (entry & 0xFFFF).to(tl.int32) & ~_kept_bits(ENTRIES, count, run * WIDTH, SEARCH_STEPS)
            far = ((bits[None, :] >> o_row[:, None]) & 1) != 0
            far = far & m_split[:, None] & ((run * WIDTH)[None, :] < tl.minimum(length, begin)[:, None])
            scores = tl.dot(b_q, b_k, input_precision=PRECISION) * scale + offset[None, :]
            highest, total, acc = _accumulate(scores, far, b_v, highest, total, acc, PRECISION)

    # The bins of each row's width that are not split.
    low = tl.min(tl.where(length > 0, level, 31))
    high = tl.max(level)
    longest = tl.max(length)
    BIN_K += item_head * num_levels * (NUM_BINS * HEAD_DIM)
    BIN_V += item_head * num_levels * (NUM_BINS * VALUE_DIM)
    BIN_OFFSET += item_head * num_levels * NUM_BINS
    p_word = BITS + (item_head * num_queries + rows) * (NUM_BINS // 32)
    for current in range(low, high + 1):
        m_level = (length > 0) & (level == current)
        used = tl.minimum((longest + (1 << current) - 1) >> current, NUM_BINS)
        for word in range(0, (used + 31) // 32):
            o_bin = word * 32 + o_tile
            bin_ = current * NUM_BINS + o_bin
            b_k = tl.load(BIN_K + bin_[None, :] * HEAD_DIM + o_dim[:, None], mask=m_dim, other=0.0)
            b_v = tl.load(BIN_V + bin_[:, None] * VALUE_DIM + o_value[None, :], mask=m_value, other=0.0)
            offset = tl.load(BIN_OFFSET + bin_) * LOG2E
            start = o_bin << current
            bits = tl.load(p_word + word, mask=m_level, other=-1)
            split = ((bits[:, None] >> o_tile[None, :]) & 1) != 0
            if LOOKS_TWICE and current <= WIDTH_LEVEL:  # bins within runs are not split: what does the row keep?
                run = start // WIDTH * WIDTH
                kept = _kept_bits(ENTRIES, count, run, SEARCH_STEPS)
                split = ((kept[None, :] >> o_row[:, None]) & 1) != 0
                split = split | (run[None, :] >= begin[:, None])
            far = m_level[:, None] & (start[None, :] < length[:, None]) & (split == 0)
            scores = tl.dot(b_q, b_k, input_precision=PRECISION) * scale + offset[None, :]
            highest, total, acc = _accumulate(scores, far, b_v, highest, total, acc, PRECISION)

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    p_out = OUT + (item_head * num_queries + rows)[:, None] * VALUE_DIM + o_value[None, :]
    tl.store(p_out, out.to(OUT.dtype.element_ty), mask=m_row[:, None] & m_value)
