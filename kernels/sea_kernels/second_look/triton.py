"""Triton form of the second look.

A program scores the runs inside the union of its rows' coarse bins on the matrix units and writes, for each row, the
row's own candidates one after another to a scratch buffer that stays in the cache. (Which place is whose, it finds out
once per bin.) Then it reads them back into registers, finds each row's threshold by bisection, and writes the kept
starts in ascending order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks import BinMask
from ..triton_common import (
    group_rows,
    item_span,
    item_spans,
    next_power_of_2,
    on_device,
    row_span,
    with_dense_rows,
)
from ..triton_entries import BLOCK_ROWS
from ..triton_pooling import pool_runs
from ..triton_ranking import threshold, tie_cut
from .triton_launches import plan_launches

TILE_RUNS = 32  # runs scored at a time
SLOTS_PER_WARP = 128  # candidates of a row that one warp holds in registers
MAX_WARPS = 32


def second_look(
    query: Tensor,
    key: Tensor,
    coarse: BinMask,
    *,
    capacity: int,
    width: int,
    window: int,
    causal: bool,
    scaling: float,
    mean_weight: Tensor,
    bound_weight: Tensor | None,
    keep_first: bool,
    attention_mask: Tensor | None,
    stride: int,
) -> Tensor:
    """See :func:`sea_kernels.second_look`; returns the starts of ``capacity`` runs per row."""
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    spans = item_spans(attention_mask)
    query, key = with_dense_rows(query), with_dense_rows(key)
    starts = coarse.bits.new_empty(batch, heads, num_queries, capacity)
    if spans is not None:
        starts.fill_(-1)  # with a stride, no program visits rows of padding
    with on_device(query):
        pooled = pool_runs(key, heads, width, spans, scaling, mean_weight, bound_weight)
        for launch in plan_launches(coarse, num_keys, causal, spans, width=width, stride=stride):
            lists, slots = launch.lists, launch.slots
            entries = lists.build(launch.first_block, launch.num_blocks)
            grid = (launch.num_blocks, batch * lists.heads)
            # Per row: a score per candidate, the rank of each entry among the row's own, the first run of each rank.
            sizes = {torch.float32: slots, torch.int16: lists.capacity, torch.int32: slots}
            scratch = [query.new_empty(*grid, size, BLOCK_ROWS, dtype=dtype) for dtype, size in sizes.items()]
            _second_look_kernel[grid](
                query,
                pooled,
                entries.packed,
                entries.meta,
                *scratch,
                starts,
                spans,
                launch.order,
                *query.stride()[:3],
                heads,
                lists.heads,
                launch.first_head,
                num_queries,
                num_keys,
                launch.first_block,
                window // width,
                stride,
                pooled.shape[2],
                HEAD_DIM=query.shape[-1],
                HEAD_PADDED=max(16, next_power_of_2(query.shape[-1])),
                PARTS=pooled.shape[3],
                CAPACITY=lists.capacity,
                SLOTS=slots,
                KEPT=capacity,
                KEPT_PADDED=next_power_of_2(capacity),
                ROWS=BLOCK_ROWS,
                TILE=TILE_RUNS,
                WIDTH=width,
                WIDTH_LEVEL=width.bit_length() - 1,
                CAUSAL=causal,
                KEEP_FIRST=keep_first,
                HAS_WINDOW=window > 0,
                HAS_PADDING=spans is not None,
                HAS_STRIDE=stride > 1,
                PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
                num_warps=min(MAX_WARPS, max(1, slots // SLOTS_PER_WARP)),
                num_stages=2,
                # 12 warps instead of 8 on an H100's multiprocessor, worth the few registers that half precision spills;
                # programs of more warps than that must use fewer
                maxnreg=168 if query.itemsize == 2 and slots <= 8 * SLOTS_PER_WARP else None,
            )
    return starts


@triton.jit
def _candidate_limit(position, length, window_runs, WIDTH: tl.constexpr, CAUSAL: tl.constexpr):
    """Runs from this one on are no candidates: they reach into the row's window or its own run, or hold no key."""
    if CAUSAL:
        return tl.where(length > 0, tl.maximum(position // WIDTH - window_runs, 0), 0)
    else:
        return (length + WIDTH - 1) // WIDTH


@triton.jit(
    do_not_specialize=[
        "own_heads",
        "first_head",
        "num_queries",
        "num_keys",
        "first_block",
        "window_runs",
        "stride",
        "num_runs",
    ]
)
def _second_look_kernel(
    Q,
    POOLED,
    ENTRIES,
    META,
    SCORES,
    RANKS,
    BEGINS,
    STARTS,
    SPANS,
    ORDER,
    q_item,
    q_head,
    q_row,
    heads,
    own_heads,
    first_head,
    num_queries,
    num_keys,
    first_block,
    window_runs,
    stride,
    num_runs,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    SLOTS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_LEVEL: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEEP_FIRST: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The heads of a launch, of every item: those that lie side by side in ORDER, or all of them.
    block, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    item, head = index // own_heads, index % own_heads
    if ORDER is not None:
        head = tl.load(ORDER + first_head + head).to(tl.int64)
    item_head = item * heads + head
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    offset = num_keys - num_queries - first
    o_row = tl.arange(0, ROWS)
    rows = (first_block + block) * ROWS + o_row
    leader = rows + offset
    if HAS_STRIDE:
        leader, rows = group_rows(rows, offset, stride)
    position, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    limit = _candidate_limit(position, length, window_runs, WIDTH, CAUSAL)
    place = index * tl.num_programs(0) + block

    # Each row counts its entries: the rank of every entry (-1 where the row drops it), the first run of every rank.
    ENTRIES += place * CAPACITY
    count = tl.load(META + place * 2)
    level = tl.load(META + place * 2 + 1) - WIDTH_LEVEL  # log2 of an entry's runs
    o_tile = tl.arange(0, TILE)
    # Lanes are shuffled rows: of contiguous ones a thread would read four, and share each with seven other threads.
    o_lane = ((o_row * 5) % ROWS)[:, None]
    p_rank = RANKS + place * (CAPACITY * ROWS) + o_lane
    p_begin = BEGINS + place * (SLOTS * ROWS) + o_lane
    p_score = SCORES + place * (SLOTS * ROWS) + o_lane
    o_entry = tl.arange(0, ROWS)  # as many entries at a time
    filled = tl.zeros([ROWS], tl.int32)
    for begin in range(0, count, ROWS):
        m_entry = begin + o_entry < count
        entry = tl.load(ENTRIES + begin + o_entry, mask=m_entry, other=0)
        run = (entry >> 16).to(tl.int32) // WIDTH
        own = ((entry.to(tl.int32)[None, :] >> o_row[:, None]) & 1) != 0
        own = own & (run[None, :] < limit[:, None])
        one = own.to(tl.int32)
        rank = filled[:, None] + tl.cumsum(one, 1) - one
        p_tile = p_rank + (begin + o_entry)[None, :] * ROWS
        tl.store(p_tile, tl.where(own, rank, -1).to(tl.int16), mask=tl.broadcast_to(m_entry[None, :], (ROWS, ROWS)))
        tl.store(p_begin + rank * ROWS, tl.broadcast_to(run[None, :], (ROWS, ROWS)), mask=own)
        filled += tl.sum(one, 1)
    filled = filled << level
    tl.debug_barrier()  # what other threads wrote is read below

    o_dim = tl.arange(0, HEAD_PADDED)
    m_dim = o_dim < HEAD_DIM
    p_q = Q + item * q_item + head * q_head + rows.to(tl.int64)[:, None] * q_row + o_dim[None, :]
    b_q = tl.load(p_q, mask=(length > 0)[:, None] & m_dim[None, :], other=0.0)  # [ROWS, HEAD]
    POOLED += item_head * num_runs * (PARTS * HEAD_DIM)
    for step in range(0, ((count << level) + TILE - 1) // TILE):
        o_flat = step * TILE + o_tile
        m_flat = (o_flat >> level) < count
        entry = tl.load(ENTRIES + (o_flat >> level), mask=m_flat, other=0)
        within = o_flat & ((1 << level) - 1)
        run = ((entry >> 16).to(tl.int32) // WIDTH) + within
        m_run = m_flat & (run < num_runs)  # an entry may reach past the end
        p_run = POOLED + run.to(tl.int64)[None, :] * (PARTS * HEAD_DIM) + o_dim[:, None]
        near = tl.load(p_run, mask=m_run[None, :] & m_dim[:, None], other=0.0)  # [HEAD, TILE]
        scores = tl.dot(b_q, near, input_precision=PRECISION)
        if PARTS == 2:
            far = tl.load(p_run + HEAD_DIM, mask=m_run[None, :] & m_dim[:, None], other=0.0)
            scores = tl.dot(tl.abs(b_q), far, scores, input_precision=PRECISION)
        m_tile = tl.broadcast_to(m_flat[None, :], (ROWS, TILE))
        rank = tl.load(p_rank + (o_flat >> level)[None, :] * ROWS, mask=m_tile, other=-1).to(tl.int32)
        competes = run[None, :] < limit[:, None]
        if KEEP_FIRST:
            competes = competes & (run > 0)[None, :]
        slot = (rank << level) + within[None, :]
        tl.store(p_score + slot * ROWS, tl.where(competes, scores, float("-inf")), mask=rank >= 0)
    tl.debug_barrier()  # what other threads wrote is read below

    # What a row keeps without competing: its own run where there is no window, then the first run.
    has_own = length > 0 if CAUSAL and not HAS_WINDOW else length < 0
    has_first = (limit > 0) & (has_own.to(tl.int32) < KEPT) if KEEP_FIRST else length < 0
    forced = has_own.to(tl.int32) + has_first.to(tl.int32)
    o_slot = tl.arange(0, SLOTS)
    m_slot = o_slot[None, :] < filled[:, None]
    values = tl.load(p_score + o_slot[None, :] * ROWS, mask=m_slot, other=float("-inf"))  # [ROWS, SLOTS]
    m_slot = values > float("-inf")
    candidates = tl.sum(m_slot.to(tl.int32), 1)
    budget = tl.minimum(candidates, KEPT - forced)
    lowest = tl.min(tl.where(m_slot, values, float("inf")), 1)
    below, above, left = threshold(values, tl.where(candidates > 0, lowest, 0.0), candidates, budget)
    keep = values > above[:, None]
    if tl.max(left) > 0:
        tied = (values > below[:, None]) & (values <= above[:, None])
        cut = tie_cut(tied, left, SLOTS)
        keep = keep | (tied & (o_slot[None, :] <= cut[:, None]))
    one = keep.to(tl.int32)
    target = has_first.to(tl.int32)[:, None] + tl.cumsum(one, 1) - one
    begin = tl.load(p_begin + (o_slot >> level)[None, :] * ROWS, mask=keep, other=0)
    start = (begin + (o_slot & ((1 << level) - 1))[None, :]) * WIDTH
    o_kept = tl.arange(0, KEPT_PADDED)
    total = (forced + budget)[:, None]
    edge = tl.where(has_own[:, None] & (o_kept[None, :] == total - 1), (position // WIDTH * WIDTH)[:, None], -1)
    edge = tl.where(has_first[:, None] & (o_kept == 0)[None, :], 0, edge)
    m_edge = ((o_kept[None, :] >= total) | (edge >= 0)) & (o_kept < KEPT)[None, :]
    for member in range(0, stride):
        row = leader + member - offset
        m_row = (length > 0) & (row >= 0) & (row < num_queries) & (leader + member < real)
        p_start = STARTS + ((item_head * num_queries + row) * KEPT)[:, None]
        tl.store(p_start + target, start, mask=keep & m_row[:, None])
        tl.store(p_start + o_kept[None, :], edge, mask=m_edge & m_row[:, None])
