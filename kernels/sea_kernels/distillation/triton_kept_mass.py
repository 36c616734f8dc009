"""Triton form of the kept mass: the dense log-sum-exp of every row, then a walk along the keys that rows keep."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks import BinMask, RunMask
from ..triton_common import item_span, item_spans, on_device, row_span, with_dense_rows
from ..triton_entries import BLOCK_ROWS, RELATIVE_TILE, Entries, EntryLists, relative_start
from .triton_scores import LOG2E, load_rows, padded_width, product_precision, row_lse


@torch.no_grad()
def kept_mass(
    query: Tensor,
    key: Tensor,
    mask: BinMask | RunMask,
    *,
    causal: bool,
    scaling: float,
    attention_mask: Tensor | None,
) -> Tensor:
    """See :func:`sea_kernels.kept_mass`."""
    query, key, spans = with_dense_rows(query), with_dense_rows(key), item_spans(attention_mask)
    lse = row_lse(query, key, spans, causal=causal, scaling=scaling)
    kept = torch.empty_like(lse)
    with on_device(query):
        lists = EntryLists(mask, key.shape[2], causal, spans)
        for first_block, num_blocks in lists.chunks():
            _sum_kept(query, key, lse, kept, lists, lists.build(first_block, num_blocks), scaling)
    return kept


def _sum_kept(
    query: Tensor, key: Tensor, lse: Tensor, kept: Tensor, lists: EntryLists, entries: Entries, scaling: float
) -> None:
    batch, heads, num_queries, head_dim = query.shape
    mask, relative = lists.mask, lists.relative
    wide = head_dim * query.element_size() > 256
    _kept_kernel[(entries.meta.shape[1], batch * heads)](
        query,
        key,
        lse,
        kept,
        entries.packed,
        entries.meta,
        lists.source,
        lists.spans,
        *query.stride()[:3],
        *key.stride()[:3],
        heads,
        heads // key.shape[1],
        num_queries,
        key.shape[2],
        entries.first_block,
        mask.shift if relative else 0,
        scaling * LOG2E,
        HEAD_DIM=head_dim,
        HEAD_PADDED=padded_width(query),
        CAPACITY=lists.capacity,
        NUM_BINS=mask.num_bins if relative else 32,
        ROWS=BLOCK_ROWS,
        TILE=RELATIVE_TILE if relative or wide else 32,
        CAUSAL=lists.causal,
        HAS_PADDING=lists.spans is not None,
        RELATIVE=relative,
        HAS_SHIFT=relative and mask.shift != 0,
        PRECISION=product_precision(query),
        num_warps=1,
        num_stages=2 if wide else 3,
    )


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_block", "shift", "scale"])
def _kept_kernel(
    Q,
    K,
    LSE,
    KEPT,
    ENTRIES,
    META,
    BITS,
    SPANS,
    q_item,
    q_head,
    q_row,
    k_item,
    k_head,
    k_row,
    heads,
    heads_per_group,
    num_queries,
    num_keys,
    first_block,
    shift,
    scale,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    CAPACITY: tl.constexpr,
    NUM_BINS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    block, item_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    item, head = item_head // heads, item_head % heads
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    o_row, o_tile = tl.arange(0, ROWS), tl.arange(0, TILE)
    rows = (first_block + block) * ROWS + o_row
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    m_row = rows < num_queries
    b_q = load_rows(Q + item * q_item + head * q_head, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)  # [ROWS, HEAD]
    K += item * k_item + (head // heads_per_group) * k_head + first.to(tl.int64) * k_row
    lse = tl.load(LSE + item_head * num_queries + rows, mask=m_row, other=0.0) * LOG2E

    place = item_head * tl.num_programs(0) + block
    ENTRIES += place * CAPACITY
    count = tl.load(META + place * 2)
    width = tl.load(META + place * 2 + 1)  # aligned: log2 of an entry's keys; relative: tiles of an entry
    kept = tl.zeros([ROWS], tl.float32)
    steps = count * width if RELATIVE else ((count << width) + TILE - 1) // TILE
    for step in range(0, steps):
        if RELATIVE:
            entry = tl.load(ENTRIES + step // width)
            index = (entry & 0xFFFF).to(tl.int32)
            o_key = (entry >> 16).to(tl.int32) + (step % width) * TILE + o_tile
            p_word = BITS + (item_head * num_queries + rows) * (NUM_BINS // 32) + (index >> 5)
            word = tl.load(p_word, mask=m_row, other=0)
            start = relative_start(index, length, shift, NUM_BINS, HAS_SHIFT)
            end = relative_start(index + 1, length, shift, NUM_BINS, HAS_SHIFT)
            end = tl.where(((word >> (index & 31)) & 1) != 0, end, 0)
            keep = (o_key[None, :] >= start[:, None]) & (o_key[None, :] < end[:, None])
        else:
            o_flat = step * TILE + o_tile
            entry = tl.load(ENTRIES + (o_flat >> width), mask=(o_flat >> width) < count, other=0)
            o_key = (entry >> 16).to(tl.int32) + (o_flat & ((1 << width) - 1))
            keep = ((entry.to(tl.int32)[None, :] >> o_row[:, None]) & 1) != 0
            keep = keep & (o_key[None, :] < length[:, None])
        b_k = load_rows(K, o_key, o_key < real, k_row, HEAD_DIM, HEAD_PADDED)  # [TILE, HEAD]
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale - lse[:, None]
        kept += tl.sum(tl.where(keep, tl.exp2(scores), 0.0), 1)
    tl.store(KEPT + item_head * num_queries + rows, kept, mask=m_row)
