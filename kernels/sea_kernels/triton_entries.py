"""Lists of the keys that a block of rows needs, for the Triton kernels that walk them.

A block is ``BLOCK_ROWS`` rows of one head. An *entry* of its list is a few consecutive keys: the first of them and one
bit per row of the block that keeps them, or, in the relative layout, whose edges move from row to row, the bin.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .masks import BinMask, RunMask
from .triton_common import aligned_level, cdiv, count_levels, group_rows, item_span, next_power_of_2, row_span

BLOCK_ROWS = 16  # one tile of the matrix units, and one bit each in 16 bits of an entry
RELATIVE_TILE = 16  # keys of a tile where rows have edges of their own
LIST_BYTES = 1 << 28  # the lists of one launch; longer inputs take several


@dataclass(frozen=True)
class Entries:
    """Lists of consecutive blocks of rows.

    Attributes:
        packed: int64 ``[N * H, blocks, capacity]``: first key times 2^16, plus row bits (relative: plus the bin).
        meta: int32 ``[N * H, blocks, 2]``: number of entries, and log2 of the keys of each (relative: tiles of each).
        first_block: index of the first block.
    """

    packed: Tensor
    meta: Tensor
    first_block: int


class EntryLists:
    """Sizes of the lists of entries of a mask, and the launches that fill them.

    Args:
        mask: what the rows keep.
        num_keys: S.
        causal: whether a row sees only keys up to its own position.
        spans: int32 ``[N, 2]`` of ``triton_common.item_spans``.
        unit: keys that an entry has at least (aligned bins only), a power of two.
        stride: list only the first row of every group of this many (aligned bins only); a row of a block is a group.
    """

    def __init__(
        self,
        mask: BinMask | RunMask,
        num_keys: int,
        causal: bool,
        spans: Tensor | None,
        *,
        unit: int = 1,
        stride: int = 1,
    ) -> None:
        self.mask, self.num_keys, self.causal, self.spans = mask, num_keys, causal, spans
        self.unit, self.stride = unit, stride
        self.source = (mask.bits if isinstance(mask, BinMask) else mask.starts).contiguous()
        self.batch, self.heads, self.num_queries, self.slots = self.source.shape
        self.num_groups = self.num_queries if stride == 1 else cdiv(self.num_queries, stride) + 1
        self.relative = isinstance(mask, BinMask) and mask.layout == "relative"
        if self.relative:
            self.capacity = mask.num_bins
        elif isinstance(mask, BinMask):
            # A block may hold rows of several widths; the wider bins are then listed as entries of the smallest.
            spread = BLOCK_ROWS * stride
            widths = 1 + cdiv(spread, mask.num_bins).bit_length()
            self.capacity = widths * (mask.num_bins + spread)
        else:
            window = (mask.window + mask.stride + BLOCK_ROWS) // mask.width + 3
            self.capacity = BLOCK_ROWS * self.slots + window

    def chunks(self) -> list[tuple[int, int]]:
        """(first block, number of blocks) of every launch."""
        return self.split(cdiv(self.num_groups, BLOCK_ROWS))

    def split(self, blocks: int, bytes_per_block: int = 0) -> list[tuple[int, int]]:
        """The first ``blocks`` blocks in launches of one size, if a block takes ``bytes_per_block`` beside its list."""
        bytes_per_block += 8 * self.capacity
        most = max(1, LIST_BYTES // (bytes_per_block * self.batch * self.heads))
        per_launch = max(1, cdiv(blocks, max(1, cdiv(blocks, most))))
        return [(first, min(per_launch, blocks - first)) for first in range(0, blocks, per_launch)]

    def build(self, first_block: int, num_blocks: int) -> Entries:
        """The lists of some blocks."""
        grid = (num_blocks, self.batch * self.heads)
        entries = torch.empty(grid[1], num_blocks, self.capacity, dtype=torch.int64, device=self.source.device)
        meta = torch.empty(grid[1], num_blocks, 2, dtype=torch.int32, device=self.source.device)
        args = self.source, entries, meta, self.spans, self.heads, self.num_queries, self.num_keys, first_block
        flags = {"CAPACITY": self.capacity, "ROWS": BLOCK_ROWS, "CAUSAL": self.causal}
        flags["HAS_PADDING"] = self.spans is not None
        mask = self.mask
        if isinstance(mask, RunMask):
            slots = next_power_of_2(max(1, self.slots))
            windowed = mask.window > 0 or mask.stride > 1
            sizes = {"WIDTH": mask.width, "LEVEL": mask.width.bit_length() - 1, "HAS_WINDOW": windowed}
            sizes |= {"SLOTS": self.slots, "SLOTS_PADDED": slots}
            _list_runs_kernel[grid](*args, mask.window, mask.stride, **sizes, **flags, num_warps=1)
            return Entries(entries, meta, first_block)
        sizes = {"NUM_BINS": mask.num_bins, "WORDS_PADDED": next_power_of_2(mask.num_bins // 32)}
        if self.relative:
            sizes["HAS_SHIFT"] = mask.shift != 0
            _list_relative_kernel[grid](*args, mask.shift, **sizes, **flags, TILE=RELATIVE_TILE, num_warps=1)
        else:
            levels = count_levels(self.num_keys, mask.num_bins)
            sizes |= {"UNIT_LEVEL": self.unit.bit_length() - 1, "HAS_STRIDE": self.stride > 1}
            _list_bins_kernel[grid](*args, levels, self.stride, **sizes, **flags, num_warps=1)
        return Entries(entries, meta, first_block)


@triton.jit
def relative_start(index, length, shift, NUM_BINS: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """First key of bin ``index`` in a row of ``length`` keys, as ``bins.bin_start`` has it. int64."""
    length = length.to(tl.int64)
    if HAS_SHIFT:
        inner = (512 * length * index + 256 * NUM_BINS + 2 * NUM_BINS * shift) // (512 * NUM_BINS)
    else:
        inner = (2 * length * index + NUM_BINS) // (2 * NUM_BINS)
    inner = tl.minimum(tl.maximum(inner, 0), length)
    return tl.where(index <= 0, 0, tl.where(index >= NUM_BINS, length, inner))


@triton.jit
def relative_bin(key, length, shift, NUM_BINS: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """Bin of ``key`` in a row of ``length`` keys, as ``bins.bin_of`` has it. int32; broadcasts."""
    length = tl.maximum(length, 1).to(tl.int64)
    if HAS_SHIFT:
        found = (NUM_BINS * (256 * (2 * key + 1) - 2 * shift) - 1) // (512 * length)
    else:
        found = (NUM_BINS * (2 * key + 1) - 1) // (2 * length)
    return tl.minimum(tl.maximum(found, 0), NUM_BINS - 1).to(tl.int32)


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


@triton.jit
def join_rows(left, right):
    """Segmented OR: entries of the same run join their row bits."""
    return tl.where((left >> 16) == (right >> 16), left | right, right)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_block", "num_levels", "stride"])
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
    stride,
    NUM_BINS: tl.constexpr,
    WORDS_PADDED: tl.constexpr,
    UNIT_LEVEL: tl.constexpr,
    HAS_STRIDE: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    block, item_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, real = item_span(SPANS, item_head // heads, num_keys, HAS_PADDING)
    rows = (first_block + block) * ROWS + tl.arange(0, ROWS)
    if HAS_STRIDE:
        _, rows = group_rows(rows, num_keys - num_queries - first, stride)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    longest = tl.max(length)
    low = tl.min(tl.where(length > 0, level, 31))
    high = tl.max(level)
    unit = tl.maximum(low, UNIT_LEVEL)
    base = ENTRIES + (item_head * tl.num_programs(0) + block) * CAPACITY
    o_bin = tl.arange(0, WORDS_PADDED * 32)
    count = 0
    for current in range(low, high + 1):
        take = (length > 0) & (level == current)
        bits = _row_bits(BITS, item_head * num_queries + rows, take, NUM_BINS, WORDS_PADDED, ROWS)
        start = o_bin << current
        keep = start < longest
        if UNIT_LEVEL > 0:  # bins smaller than a unit: the first of a unit stands for all of them
            packed = ((start >> unit).to(tl.int64) << 16) | bits
            bits = (tl.associative_scan(packed, 0, join_rows, reverse=True) & 0xFFFF).to(tl.int32)
            keep = keep & ((start & ((1 << unit) - 1)) == 0)
            bits = tl.where(current < unit, bits, (packed & 0xFFFF).to(tl.int32))
        keep = keep & (bits != 0)
        parts = 1 << tl.maximum(current - unit, 0)
        entry = tl.where(keep, parts, 0)
        place = count + tl.cumsum(entry, 0) - entry
        for part in range(0, parts):
            packed = ((start + (part << unit)).to(tl.int64) << 16) | bits
            tl.store(base + place + part, packed, mask=keep)
        count += tl.sum(entry, 0)
    meta = META + (item_head * tl.num_programs(0) + block) * 2
    tl.store(meta, count)
    tl.store(meta + 1, tl.where(low > 30, 0, unit))


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
    start = relative_start(o_bin, shortest, shift, NUM_BINS, HAS_SHIFT)
    end = relative_start(o_bin + 1, longest, shift, NUM_BINS, HAS_SHIFT)
    keep = (bits != 0) & (start < end)
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    base = ENTRIES + (item_head * tl.num_programs(0) + block) * CAPACITY
    tl.store(base + place, (start << 16) | o_bin, mask=keep)
    meta = META + (item_head * tl.num_programs(0) + block) * 2
    tl.store(meta, tl.sum(keep.to(tl.int32), 0))
    tiles = (tl.max(tl.where(keep, end - start, 1)) + TILE - 1) // TILE  # of the widest bin; the others follow it
    tl.store(meta + 1, tiles.to(tl.int32))


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
    end = length
    if HAS_WINDOW:  # a run inside the window counts once
        begin = (position // stride * stride) // WIDTH * WIDTH - window
        begin = tl.where(length > 0, tl.maximum(begin, 0), LAST)
        end = tl.minimum(begin, length)
    run = tl.where((start >= 0) & (start < end[:, None]), (start // WIDTH) * ROWS + o_row[:, None], LAST)
    run = tl.sort(tl.reshape(run, (ROWS * SLOTS_PADDED,)))
    own_bit = (1 << (run % ROWS)).to(tl.int64)
    packed = ((run // ROWS).to(tl.int64) << 16) | own_bit
    before = tl.associative_scan(packed, 0, join_rows)
    whole = tl.associative_scan(packed, 0, join_rows, reverse=True)
    leads = ((before & 0xFFFF) == own_bit) & (run != LAST)
    place = tl.cumsum(leads.to(tl.int32), 0) - 1
    entry = ((whole >> 16) * WIDTH << 16) | (whole & 0xFFFF)
    tl.store(base + place, entry, mask=leads)
    count = tl.sum(leads.to(tl.int32), 0)

    if HAS_WINDOW:
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
