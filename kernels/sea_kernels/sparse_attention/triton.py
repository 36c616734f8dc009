"""Triton form of sparse attention (forward).

A program attends with a block of rows of one head by walking the list of entries that the block needs (see
``triton_entries.py``). Short entries are gathered until they fill a tile, so the matrix units see full tiles whatever
the width of the bins; a row drops the keys of other rows by its bit. Bins of the relative layout have edges of their
own in every row: their entries name the bin, and a row compares with its own edges.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks import BinMask, RunMask
from ..triton_common import item_span, item_spans, next_power_of_2, on_device, row_span, with_dense_rows
from ..triton_entries import BLOCK_ROWS, RELATIVE_TILE, Entries, EntryLists, relative_start
from ..triton_wide_lists import WideLists, lists_of_both_passes
from ..triton_wide_rows import attend_in_bins

LOG2E = 1.4426950408889634


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BinMask | RunMask,
    *,
    causal: bool,
    scaling: float,
    attention_mask: Tensor | None,
    row_scale: Tensor | None,
    log_sum: Tensor | None = None,
) -> tuple[Tensor, WideLists | None]:
    """See :func:`sea_kernels.sparse_attention`. No gradients.

    ``log_sum``, float32 ``[N, H, T]``, takes what the backward pass needs: log2 of the sum of each row's exponentiated
    scores, 0 where a row keeps nothing.

    Returns:
        The result, and with ``log_sum`` the lists that the backward pass walks as well, if there are any.
    """
    batch, heads, num_queries, _ = query.shape
    query, key, value = with_dense_rows(query), with_dense_rows(key), with_dense_rows(value)
    output = query.new_empty(batch, heads, num_queries, value.shape[-1])
    spans = item_spans(attention_mask)
    with on_device(query):
        if isinstance(mask, BinMask) and mask.layout == "aligned":
            place = {"causal": causal, "spans": spans}
            kept = None if log_sum is None else lists_of_both_passes(query, key, value, mask, **place)
            place |= {"scaling": scaling, "row_scale": row_scale, "lists": kept}
            attend_in_bins(query, key, value, mask, output, log_sum, **place)
            return output, kept
        lists = EntryLists(mask, key.shape[2], causal, spans)
        for first_block, num_blocks in lists.chunks():
            entries = lists.build(first_block, num_blocks)
            _attend(query, key, value, output, lists, entries, scaling, row_scale, log_sum)
    return output, None


def _attend(query, key, value, output, lists: EntryLists, entries: Entries, scaling, row_scale, log_sum) -> None:
    batch, heads, num_queries, head_dim = query.shape
    value_dim = value.shape[-1]
    mask, relative = lists.mask, lists.relative
    config = _tile_config(query.dtype, head_dim, value_dim, relative)
    _attention_kernel[(entries.meta.shape[1], batch * heads)](
        query,
        key,
        value,
        output,
        entries.packed,
        entries.meta,
        lists.source,
        lists.spans,
        None if row_scale is None else row_scale.contiguous(),
        log_sum,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        heads,
        heads // key.shape[1],
        num_queries,
        key.shape[2],
        entries.first_block,
        scaling * LOG2E,
        mask.shift if relative else 0,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        HEAD_PADDED=max(16, next_power_of_2(head_dim)),
        VALUE_PADDED=max(16, next_power_of_2(value_dim)),
        CAPACITY=lists.capacity,
        NUM_BINS=mask.num_bins if relative else 32,
        ROWS=BLOCK_ROWS,
        CAUSAL=lists.causal,
        HAS_PADDING=lists.spans is not None,
        HAS_SCALE=row_scale is not None,
        SAVES_SUM=log_sum is not None,
        RELATIVE=relative,
        HAS_SHIFT=relative and mask.shift != 0,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        **config,
    )


def _tile_config(dtype: torch.dtype, head_dim: int, value_dim: int, relative: bool) -> dict:
    """Tile of keys and launch parameters. Measured on an H100 with width 64; wider rows take smaller tiles."""
    if relative:
        return {"TILE": RELATIVE_TILE, "num_warps": 1, "num_stages": 3}
    wide = max(head_dim, value_dim) * dtype.itemsize > 256
    return {"TILE": 16 if wide else 32, "num_warps": 1, "num_stages": 2 if wide else 3}


@triton.jit
def count_steps(count, width, TILE: tl.constexpr, RELATIVE: tl.constexpr):
    """Number of tiles of keys in a list of ``count`` entries; ``width`` as in ``Entries.meta``."""
    return count * width if RELATIVE else ((count << width) + TILE - 1) // TILE


@triton.jit
def visit(
    ENTRIES,
    p_words,
    step,
    count,
    width,
    length,
    shift,
    m_row,
    NUM_BINS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """Keys of a step, counted from the first real key, [TILE], and which rows keep them, [ROWS, TILE]."""
    o_tile = tl.arange(0, TILE)
    if RELATIVE:
        entry = tl.load(ENTRIES + step // width)
        index = (entry & 0xFFFF).to(tl.int32)
        o_key = (entry >> 16).to(tl.int32) + (step % width) * TILE + o_tile
        word = tl.load(p_words + (index >> 5), mask=m_row, other=0)
        start = relative_start(index, length, shift, NUM_BINS, HAS_SHIFT)
        end = relative_start(index + 1, length, shift, NUM_BINS, HAS_SHIFT)
        end = tl.where(((word >> (index & 31)) & 1) != 0, end, 0)
        keep = (o_key[None, :] >= start[:, None]) & (o_key[None, :] < end[:, None])
    else:
        o_flat = step * TILE + o_tile
        m_flat = (o_flat >> width) < count
        entry = tl.load(ENTRIES + (o_flat >> width), mask=m_flat, other=0)
        o_key = (entry >> 16).to(tl.int32) + (o_flat & ((1 << width) - 1))
        keep = ((entry.to(tl.int32)[None, :] >> tl.arange(0, ROWS)[:, None]) & 1) != 0
        keep = keep & (o_key[None, :] < length[:, None])
    return o_key, keep


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_block", "shift", "scale"])
def _attention_kernel(
    Q,
    K,
    V,
    OUT,
    ENTRIES,
    META,
    BITS,
    SPANS,
    ROW_SCALE,
    LOG_SUM,
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
    scale,
    shift,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    CAPACITY: tl.constexpr,
    NUM_BINS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SAVES_SUM: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, item_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    item, head = item_head // heads, item_head % heads
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = (first_block + block) * ROWS + tl.arange(0, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    m_row = rows < num_queries
    o_dim, o_value = tl.arange(0, HEAD_PADDED), tl.arange(0, VALUE_PADDED)
    m_dim, m_value = o_dim < HEAD_DIM, o_value < VALUE_DIM

    p_q = Q + item * q_item + head * q_head + rows.to(tl.int64)[:, None] * q_row + o_dim[None, :]
    b_q = tl.load(p_q, mask=m_row[:, None] & m_dim[None, :], other=0.0)  # [ROWS, HEAD]
    K += item * k_item + (head // heads_per_group) * k_head + first.to(tl.int64) * k_row
    V += item * v_item + (head // heads_per_group) * v_head + first.to(tl.int64) * v_row

    place = item_head * tl.num_programs(0) + block
    ENTRIES += place * CAPACITY
    count = tl.load(META + place * 2)
    width = tl.load(META + place * 2 + 1)  # aligned: log2 of an entry's keys; relative: tiles of an entry
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    steps = count_steps(count, width, TILE, RELATIVE)
    for step in range(0, steps):
        o_key, keep = visit(
            ENTRIES,
            BITS + (item_head * num_queries + rows) * (NUM_BINS // 32),
            step,
            count,
            width,
            length,
            shift,
            m_row,
            NUM_BINS,
            ROWS,
            TILE,
            RELATIVE,
            HAS_SHIFT,
        )
        m_key = o_key < real
        p_k = K + o_key.to(tl.int64)[None, :] * k_row + o_dim[:, None]
        b_k = tl.load(p_k, mask=m_key[None, :] & m_dim[:, None], other=0.0)  # [HEAD, TILE]
        p_v = V + o_key.to(tl.int64)[:, None] * v_row + o_value[None, :]
        b_v = tl.load(p_v, mask=m_key[:, None] & m_value[None, :], other=0.0)  # [TILE, VALUE]
        scores = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        scores = tl.where(keep, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        rescale = tl.exp2(highest - new_highest)
        total = total * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None] + tl.dot(weights.to(b_v.dtype), b_v, input_precision=PRECISION)
        highest = new_highest
    if SAVES_SUM:
        log_sum = highest + tl.log2(tl.where(total == 0.0, 1.0, total))
        tl.store(LOG_SUM + item_head * num_queries + rows, tl.where(total == 0.0, 0.0, log_sum), mask=m_row)
    factor = 1.0 / tl.where(total == 0.0, 1.0, total)
    if HAS_SCALE:
        factor *= tl.load(ROW_SCALE + item_head * num_queries + rows, mask=m_row, other=0.0).to(tl.float32)
    p_out = OUT + (item_head * num_queries + rows)[:, None] * VALUE_DIM + o_value[None, :]
    tl.store(p_out, (acc * factor[:, None]).to(OUT.dtype.element_ty), mask=m_row[:, None] & m_value[None, :])
