"""Triton form of sparse attention (forward).

A program attends with a block of rows of one head. A first kernel lists what the block needs: *entries* of a few
consecutive keys with one bit per row of the block that keeps them. The second walks the list. Short entries are
gathered until they fill a tile, so the matrix units see full tiles whatever the width of the bins; a row drops the keys
of other rows by its bit. Bins of the relative layout have edges of their own in every row: their entries name the bin,
and a row compares with its own edges.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks import BinMask, RunMask
from ..triton_common import aligned_level, count_levels, item_span, item_spans, on_device, row_span, with_dense_rows

BLOCK_ROWS = 16  # rows of one program: one tile of the matrix units, and one bit each in 16 bits of an entry
RELATIVE_TILE = 16
LIST_BYTES = 1 << 28  # the lists of one launch; longer inputs take several
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
) -> Tensor:
    """See :func:`sea_kernels.sparse_attention`. No gradients."""
    batch, heads, num_queries, _ = query.shape
    query, key, value = with_dense_rows(query), with_dense_rows(key), with_dense_rows(value)
    output = query.new_empty(batch, heads, num_queries, value.shape[-1])
    spans = item_spans(attention_mask)
    with on_device(query):
        lists = _Lists(mask, key.shape[2], causal, spans)
        for first_block, num_blocks in lists.chunks():
            entries, meta = lists.build(first_block, num_blocks)
            _attend(query, key, value, output, mask, lists, entries, meta, first_block, scaling, row_scale)
    return output


class _Lists:
    """Sizes of the lists of entries and the launches that fill them."""

    def __init__(self, mask: BinMask | RunMask, num_keys: int, causal: bool, spans: Tensor | None):
        self.mask, self.num_keys, self.causal, self.spans = mask, num_keys, causal, spans
        self.source = (mask.bits if isinstance(mask, BinMask) else mask.starts).contiguous()
        self.batch, self.heads, self.num_queries, self.slots = self.source.shape
        self.relative = isinstance(mask, BinMask) and mask.layout == "relative"
        if self.relative:
            self.capacity = mask.num_bins
        elif isinstance(mask, BinMask):
            # A block may hold rows of two widths; the wider bins are then listed as two entries each.
            self.capacity = 2 * mask.num_bins + 2 * BLOCK_ROWS
        else:
            window = (mask.window + mask.stride + BLOCK_ROWS) // mask.width + 3
            self.capacity = BLOCK_ROWS * self.slots + window

    def chunks(self) -> list[tuple[int, int]]:
        """(first block, number of blocks) of every launch."""
        blocks = triton.cdiv(self.num_queries, BLOCK_ROWS)
        per_launch = max(1, LIST_BYTES // (8 * self.capacity * self.batch * self.heads))
        return [(first, min(per_launch, blocks - first)) for first in range(0, blocks, per_launch)]

    def build(self, first_block: int, num_blocks: int) -> tuple[Tensor, Tensor]:
        """Entries ``[N * H, blocks, capacity]`` and per block their number and width ``[N * H, blocks, 2]``."""
        grid = (num_blocks, self.batch * self.heads)
        entries = torch.empty(grid[1], num_blocks, self.capacity, dtype=torch.int64, device=self.source.device)
        meta = torch.empty(grid[1], num_blocks, 2, dtype=torch.int32, device=self.source.device)
        args = self.source, entries, meta, self.spans, self.heads, self.num_queries, self.num_keys, first_block
        flags = {"CAPACITY": self.capacity, "ROWS": BLOCK_ROWS, "CAUSAL": self.causal}
        flags["HAS_PADDING"] = self.spans is not None
        mask = self.mask
        if isinstance(mask, RunMask):
            slots = triton.next_power_of_2(max(1, self.slots))
            windowed = mask.window > 0 or mask.stride > 1
            sizes = {"WIDTH": mask.width, "LEVEL": mask.width.bit_length() - 1, "HAS_WINDOW": windowed}
            sizes |= {"SLOTS": self.slots, "SLOTS_PADDED": slots}
            _list_runs_kernel[grid](*args, mask.window, mask.stride, **sizes, **flags, num_warps=1)
            return entries, meta
        sizes = {"NUM_BINS": mask.num_bins, "WORDS_PADDED": triton.next_power_of_2(mask.num_bins // 32)}
        if self.relative:
            sizes["HAS_SHIFT"] = mask.shift != 0
            _list_relative_kernel[grid](*args, mask.shift, **sizes, **flags, TILE=RELATIVE_TILE, num_warps=1)
        else:
            levels = count_levels(self.num_keys, mask.num_bins)
            _list_bins_kernel[grid](*args, levels, **sizes, **flags, num_warps=1)
        return entries, meta


def _attend(query, key, value, output, mask, lists, entries, meta, first_block, scaling, row_scale) -> None:
    batch, heads, num_queries, head_dim = query.shape
    value_dim = value.shape[-1]
    relative = lists.relative
    config = _tile_config(query.dtype, head_dim, value_dim, relative)
    _attention_kernel[(meta.shape[1], batch * heads)](
        query,
        key,
        value,
        output,
        entries,
        meta,
        lists.source,
        lists.spans,
        None if row_scale is None else row_scale.contiguous(),
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        heads,
        heads // key.shape[1],
        num_queries,
        key.shape[2],
        first_block,
        scaling * LOG2E,
        mask.shift if relative else 0,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        HEAD_PADDED=max(16, triton.next_power_of_2(head_dim)),
        VALUE_PADDED=max(16, triton.next_power_of_2(value_dim)),
        CAPACITY=lists.capacity,
        NUM_BINS=mask.num_bins if relative else 32,
        ROWS=BLOCK_ROWS,
        CAUSAL=lists.causal,
        HAS_PADDING=lists.spans is not None,
        HAS_SCALE=row_scale is not None,
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
def _relative_start(index, length, shift, NUM_BINS: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """First key of bin ``index`` in a row of ``length`` keys, as ``bins.bin_start`` has it. int64."""
    length = length.to(tl.int64)
    if HAS_SHIFT:
        inner = (512 * length * index + 256 * NUM_BINS + 2 * NUM_BINS * shift) // (512 * NUM_BINS)
    else:
        inner = (2 * length * index + NUM_BINS) // (2 * NUM_BINS)
    inner = tl.minimum(tl.maximum(inner, 0), length)
    return tl.where(index <= 0, 0, tl.where(index >= NUM_BINS, length, inner))


@triton.jit
def _row_bits(BITS, offsets, take, NUM_BINS: tl.constexpr, WORDS_PADDED: tl.constexpr, ROWS: tl.constexpr):
    """For each bin, 16 bits that say which rows of the block keep it. [WORDS_PADDED * 32]"""
    WORDS: tl.constexpr = NUM_BINS // 32
    o_word = tl.arange(0, WORDS_PADDED)
    m_word = take[:, None] & (o_word < WORDS)[None, :]
    words = tl.load(BITS + offsets[:, None] * WORDS + o_word[None, :], mask=m_word, other=0)  # [ROWS, WORDS]
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1  # [ROWS, WORDS, 32]
    bits = tl.sum(bits << tl.arange(0, ROWS)[:, None, None], 0)  # [WORDS, 32]
    return tl.reshape(bits, (WORDS_PADDED * 32,))


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_block", "num_levels"])
def _list_bins_kernel(
    BITS,
    ENTRIES,
    META,
    SPANS,
    heads,
    num_queries,
    num_keys,
    first_block,
    num_levels,
    NUM_BINS: tl.constexpr,
    WORDS_PADDED: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    block, item_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, real = item_span(SPANS, item_head // heads, num_keys, HAS_PADDING)
    rows = (first_block + block) * ROWS + tl.arange(0, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    longest = tl.max(length)
    low = tl.min(tl.where(length > 0, level, 31))
    high = tl.max(level)
    base = ENTRIES + (item_head * tl.num_programs(0) + block) * CAPACITY
    o_bin = tl.arange(0, WORDS_PADDED * 32)
    count = 0
    for current in range(low, high + 1):
        take = (length > 0) & (level == current)
        bits = _row_bits(BITS, item_head * num_queries + rows, take, NUM_BINS, WORDS_PADDED, ROWS)
        keep = (bits != 0) & ((o_bin << current) < longest)
        entry = tl.where(keep, 1, 0) << (current - low)
        place = count + tl.cumsum(entry, 0) - entry
        for part in range(0, 1 << (current - low)):
            start = (o_bin << current) + (part << low)
            packed = (start.to(tl.int64) << 16) | bits
            tl.store(base + place + part, packed, mask=keep)
        count += tl.sum(entry, 0)
    meta = META + (item_head * tl.num_programs(0) + block) * 2
    tl.store(meta, count)
    tl.store(meta + 1, tl.where(low > 30, 0, low))


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_block", "shift"])
def _list_relative_kernel(
    BITS,
    ENTRIES,
    META,
    SPANS,
    heads,
    num_queries,
    num_keys,
    first_block,
    shift,
    NUM_BINS: tl.constexpr,
    WORDS_PADDED: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    TILE: tl.constexpr,
):
    block, item_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, real = item_span(SPANS, item_head // heads, num_keys, HAS_PADDING)
    rows = (first_block + block) * ROWS + tl.arange(0, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    longest = tl.max(length)
    shortest = tl.min(tl.where(length > 0, length, longest))
    bits = _row_bits(BITS, item_head * num_queries + rows, length > 0, NUM_BINS, WORDS_PADDED, ROWS)
    o_bin = tl.arange(0, WORDS_PADDED * 32)
    start = _relative_start(o_bin, shortest, shift, NUM_BINS, HAS_SHIFT)
    end = _relative_start(o_bin + 1, longest, shift, NUM_BINS, HAS_SHIFT)
    keep = (bits != 0) & (start < end)
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    base = ENTRIES + (item_head * tl.num_programs(0) + block) * CAPACITY
    tl.store(base + place, (start << 16) | o_bin, mask=keep)
    meta = META + (item_head * tl.num_programs(0) + block) * 2
    tl.store(meta, tl.sum(keep.to(tl.int32), 0))
    tiles = (tl.max(tl.where(keep, end - start, 1)) + TILE - 1) // TILE  # of the widest bin; the others follow it
    tl.store(meta + 1, tiles.to(tl.int32))


@triton.jit
def _join_rows(left, right):
    """Segmented OR: entries of the same run join their row bits."""
    return tl.where((left >> 16) == (right >> 16), left | right, right)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_block", "window", "stride"])
def _list_runs_kernel(
    STARTS,
    ENTRIES,
    META,
    SPANS,
    heads,
    num_queries,
    num_keys,
    first_block,
    window,
    stride,
    WIDTH: tl.constexpr,
    LEVEL: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PADDED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    block, item_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, real = item_span(SPANS, item_head // heads, num_keys, HAS_PADDING)
    o_row = tl.arange(0, ROWS)
    rows = (first_block + block) * ROWS + o_row
    position, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    base = ENTRIES + (item_head * tl.num_programs(0) + block) * CAPACITY
    LAST: tl.constexpr = 2147483647

    # Sorted by start, then by row: equal starts lie side by side and become one entry.
    o_slot = tl.arange(0, SLOTS_PADDED)
    m_slot = (length > 0)[:, None] & (o_slot < SLOTS)[None, :]
    p_slot = STARTS + (item_head * num_queries + rows)[:, None] * SLOTS + o_slot[None, :]
    start = tl.load(p_slot, mask=m_slot, other=-1)
    run = tl.where((start >= 0) & (start < length[:, None]), (start // WIDTH) * ROWS + o_row[:, None], LAST)
    run = tl.sort(tl.reshape(run, (ROWS * SLOTS_PADDED,)))
    own_bit = (1 << (run % ROWS)).to(tl.int64)
    packed = ((run // ROWS).to(tl.int64) << 16) | own_bit
    before = tl.associative_scan(packed, 0, _join_rows)
    whole = tl.associative_scan(packed, 0, _join_rows, reverse=True)
    leads = ((before & 0xFFFF) == own_bit) & (run != LAST)
    place = tl.cumsum(leads.to(tl.int32), 0) - 1
    entry = ((whole >> 16) * WIDTH << 16) | (whole & 0xFFFF)
    tl.store(base + place, entry, mask=leads)
    count = tl.sum(leads.to(tl.int32), 0)

    if HAS_WINDOW:
        begin = (position // stride * stride) // WIDTH * WIDTH - window
        begin = tl.where(length > 0, tl.maximum(begin, 0), LAST)
        unit = tl.min(begin) // WIDTH
        units = tl.where(tl.max(length) > 0, (tl.max(length) + WIDTH - 1) // WIDTH - unit, 0)
        o_unit = tl.arange(0, 32)
        for offset in range(0, units, 32):
            unit_start = (unit + offset + o_unit) * WIDTH
            inside = (unit_start[None, :] >= begin[:, None]) & (unit_start[None, :] < length[:, None])  # [ROWS, 32]
            bits = tl.sum(inside.to(tl.int32) << o_row[:, None], 0)
            m_unit = offset + o_unit < units
            tl.store(base + count + offset + o_unit, (unit_start.to(tl.int64) << 16) | bits, mask=m_unit)
        count += units
    meta = META + (item_head * tl.num_programs(0) + block) * 2
    tl.store(meta, count)
    tl.store(meta + 1, LEVEL)


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
    RELATIVE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, item_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    item, head = item_head // heads, item_head % heads
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    o_row = tl.arange(0, ROWS)
    rows = (first_block + block) * ROWS + o_row
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
    o_tile = tl.arange(0, TILE)
    steps = count * width if RELATIVE else ((count << width) + TILE - 1) // TILE
    for step in range(0, steps):
        if RELATIVE:
            entry = tl.load(ENTRIES + step // width)
            index = (entry & 0xFFFF).to(tl.int32)
            o_key = (entry >> 16).to(tl.int32) + (step % width) * TILE + o_tile
            word = tl.load(
                BITS + (item_head * num_queries + rows) * (NUM_BINS // 32) + (index >> 5), mask=m_row, other=0
            )
            start = _relative_start(index, length, shift, NUM_BINS, HAS_SHIFT)
            end = _relative_start(index + 1, length, shift, NUM_BINS, HAS_SHIFT)
            end = tl.where(((word >> (index & 31)) & 1) != 0, end, 0)
            keep = (o_key[None, :] >= start[:, None]) & (o_key[None, :] < end[:, None])
        else:
            o_flat = step * TILE + o_tile
            m_flat = (o_flat >> width) < count
            entry = tl.load(ENTRIES + (o_flat >> width), mask=m_flat, other=0)
            o_key = (entry >> 16).to(tl.int32) + (o_flat & ((1 << width) - 1))
            keep = ((entry.to(tl.int32)[None, :] >> o_row[:, None]) & 1) != 0
            keep = keep & (o_key[None, :] < length[:, None])
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
    factor = 1.0 / tl.where(total == 0.0, 1.0, total)
    if HAS_SCALE:
        factor *= tl.load(ROW_SCALE + item_head * num_queries + rows, mask=m_row, other=0.0).to(tl.float32)
    p_out = OUT + (item_head * num_queries + rows)[:, None] * VALUE_DIM + o_value[None, :]
    tl.store(p_out, (acc * factor[:, None]).to(OUT.dtype.element_ty), mask=m_row[:, None] & m_value[None, :])
