"""Entry lists turned around, for the Triton kernels that sum over the rows that keep a key (gradients of keys, values).

A *unit* is the run of keys of one entry: ``2^level`` keys at a multiple of that. For every unit of every head there is
the list of the rows that keep it, or, of wide lists, of the blocks of rows. It is a counting sort without a host
synchronisation: blocks of rows are counted in chunks, sums over units and chunks give every chunk its place in every
list, and one program per chunk then visits the chunk's blocks in order. So rows ascend from chunk to chunk and from
block to block, and two runs give equal lists.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import cdiv
from .triton_entries import BLOCK_ROWS, Entries, EntryLists
from .triton_wide_lists import SPREAD, WideLists

UNIT_BITS = 5  # of a list's element that tell apart the units of one tile, which therefore has at most 32 keys
MOST_CHUNKS = 64  # so that the table of counts grows with the keys alone
CHUNK_ROWS = 256  # rows in a chunk, at least
KINDS = 2  # of lists that a unit has of wide ones
ENTRIES_AT_ONCE = 128


class InverseLists:
    """For every unit of a head the rows that keep it.

    Within a head, unit u of level l has place ``(l - first_level) * units + u``; all lists lie one after another in the
    order of head and place, so that the lists of neighbouring units of a level are one range (``tile_range``). Of wide
    lists a unit has two: entries that all rows of a block see whole, in bins of 16 keys or more, are in the second.

    Args:
        lists: sizes and mask of the entry lists: of runs, or wide ones.
        entries: all of its entries, in the order of ``lists.chunks()``.

    Attributes:
        rows: int32 ``[bound]``: row times 2^UNIT_BITS, plus the last bits of the unit. Of wide lists block times
            2^UNIT_BITS, plus log2 of the keys of the bin. Only the first ``offsets[-1]`` are filled.
        offsets: int32 (int64 if there are very many) ``[N * H * levels * units * kinds + 1]``: where each list begins.
        kinds: lists of a unit.
        first_level: log2 of the keys of the smallest unit.
        levels: number of sizes of a unit.
        units: places per level.
        rows_each: rows of an element of ``rows``.
    """

    def __init__(self, lists: EntryLists | WideLists, entries: list[Entries]) -> None:
        self.wide = isinstance(lists, WideLists)
        self.kinds = KINDS if self.wide else 1
        if self.wide:
            self.first_level = lists.least_level
            self.levels = max(lists.least_level + 1, lists.levels) - lists.least_level
            self.units, self.rows_each, block_rows = lists.num_bins + SPREAD, lists.rows, lists.rows
            bound = lists.blocks * lists.capacity
        else:
            mask = lists.mask
            self.first_level, self.levels = mask.width.bit_length() - 1, 1
            self.units, self.rows_each, block_rows = cdiv(lists.num_keys, mask.width), 1, BLOCK_ROWS
            windowed = mask.window > 0 or mask.stride > 1
            per_row = lists.slots + ((mask.window + mask.stride) // mask.width + 3 if windowed else 0)
            bound = lists.num_queries * per_row
        self.rows, self.offsets = self._sort(lists, entries, block_rows, bound)

    def _sort(
        self, lists: EntryLists | WideLists, entries: list[Entries], block_rows: int, bound: int
    ) -> tuple[Tensor, Tensor]:
        """The lists and where they begin, if those of a head have at most ``bound`` elements."""
        heads, device = lists.batch * lists.heads, entries[0].packed.device
        blocks = cdiv(lists.num_queries, block_rows)
        chunk_blocks = max(cdiv(CHUNK_ROWS, block_rows), cdiv(blocks, MOST_CHUNKS))
        chunks = cdiv(blocks, chunk_blocks)
        places = heads * self.levels * self.units * self.kinds
        table = torch.zeros(1 + places * chunks, dtype=torch.int32, device=device)
        counts = table[1:]  # the sum before each count is where its rows begin
        sizes = self.first_level, self.levels, self.units, chunks, chunk_blocks, lists.capacity
        flags = {"WIDE": self.wide, "TILE": ENTRIES_AT_ONCE, "num_warps": 4}
        for part in entries:
            place = part.first_block, part.meta.shape[1]
            _count_kernel[place[1], heads](part.packed, part.meta, counts, *place, *sizes, **flags)
        dtype = torch.int32 if heads * bound < 2**31 else torch.int64
        starts = torch.cumsum(table, 0, dtype=dtype)
        rows = torch.empty(heads * bound, dtype=torch.int32, device=device)
        flags |= {"ROWS": BLOCK_ROWS, "UNIT_BITS": UNIT_BITS}
        for part in entries:
            place = part.first_block, part.meta.shape[1]
            _fill_kernel[chunks, heads](part.packed, part.meta, counts, starts, rows, *place, *sizes, **flags)
        return rows, starts[::chunks].contiguous()


@triton.jit
def tile_range(
    OFFSETS, item_head, level, first_key, first_level, levels, units, KEYS: tl.constexpr, KINDS: tl.constexpr = 1
):
    """Begin and end in ``rows`` of the lists of a level's units that hold one of ``KEYS`` keys from ``first_key`` on.

    first_key: a multiple of KEYS, a power of two.
    """
    place = (item_head * levels + (level - first_level)) * units
    first = tl.minimum(first_key >> level, units)
    last = tl.minimum((first_key + KEYS + (1 << level) - 1) >> level, units)
    begin, end = (place + first) * KINDS, (place + last) * KINDS
    return tl.load(OFFSETS + begin).to(tl.int64), tl.load(OFFSETS + end).to(tl.int64)


@triton.jit
def _count_bits(bits):
    """Number of ones in the lower 16 bits."""
    bits = (bits & 0x5555) + ((bits >> 1) & 0x5555)
    bits = (bits & 0x3333) + ((bits >> 2) & 0x3333)
    bits = (bits & 0x0F0F) + ((bits >> 4) & 0x0F0F)
    return (bits + (bits >> 8)) & 0x1F


@triton.jit
def _count_and_level(META, list_, WIDE: tl.constexpr):
    """Number of entries of a list, log2 of their keys, and how many are bins that all rows see whole."""
    META += list_ * (3 if WIDE else 2)
    count, level = tl.load(META), tl.load(META + 1)
    return count, level, tl.load(META + 2) if WIDE else 0


@triton.jit
def _unit_of(entry, level, WIDE: tl.constexpr):
    """Index of an entry's unit among those of its level."""
    return (entry if WIDE else entry >> 16) >> level


@triton.jit
def _list_of(unit, entry, whole, WIDE: tl.constexpr):
    """Index among all lists of the one for an entry of a unit."""
    if WIDE:
        unit = unit * 2 + (whole & ((entry & 31) >= 4)).to(tl.int32)
    return unit


@triton.jit(
    do_not_specialize=[
        "first_block",
        "num_blocks",
        "first_level",
        "levels",
        "units",
        "chunks",
        "chunk_blocks",
        "capacity",
    ]
)
def _count_kernel(
    ENTRIES,
    META,
    COUNTS,
    first_block,
    num_blocks,
    first_level,
    levels,
    units,
    chunks,
    chunk_blocks,
    capacity,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    block, item_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    list_ = item_head * num_blocks + block
    count, level, whole = _count_and_level(META, list_, WIDE)
    place = (item_head * levels + (level - first_level)) * units
    chunk = (first_block + block) // chunk_blocks
    for offset in range(0, count, TILE):
        o_entry = offset + tl.arange(0, TILE)
        m_entry = o_entry < count
        entry = tl.load(ENTRIES + list_ * capacity + o_entry, mask=m_entry, other=0)
        rows = m_entry.to(tl.int32) if WIDE else _count_bits((entry & 0xFFFF).to(tl.int32))
        place_in = _list_of(place + _unit_of(entry, level, WIDE), entry, o_entry < whole, WIDE)
        p_count = COUNTS + place_in * chunks + chunk
        tl.atomic_add(p_count, rows, mask=m_entry, sem="relaxed")  # of integers: any order gives the same sum


@triton.jit(
    do_not_specialize=[
        "first_block",
        "num_blocks",
        "first_level",
        "levels",
        "units",
        "chunks",
        "chunk_blocks",
        "capacity",
    ]
)
def _fill_kernel(
    ENTRIES,
    META,
    COUNTS,
    STARTS,
    OUT,
    first_block,
    num_blocks,
    first_level,
    levels,
    units,
    chunks,
    chunk_blocks,
    capacity,
    ROWS: tl.constexpr,
    UNIT_BITS: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write a chunk's rows to the lists. COUNTS holds the rows of the chunk that a list still lacks."""
    chunk, item_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_tile = tl.arange(0, TILE)
    begin = tl.maximum(chunk * chunk_blocks - first_block, 0)
    end = tl.minimum((chunk + 1) * chunk_blocks - first_block, num_blocks)
    for block in range(begin, end):
        list_ = item_head * num_blocks + block
        count, level, whole = _count_and_level(META, list_, WIDE)
        place = (item_head * levels + (level - first_level)) * units
        p_entry = ENTRIES + list_ * capacity
        for offset in range(0, count, TILE):
            o_entry = offset + o_tile
            m_entry = o_entry < count
            entry = tl.load(p_entry + o_entry, mask=m_entry, other=0)
            before = tl.load(p_entry + o_entry - 1, mask=m_entry & (o_tile > 0), other=-1)
            # A unit can come twice, each time for other rows, but never twice within an ascending part.
            unit = _unit_of(entry, level, WIDE)
            part = tl.cumsum((m_entry & (unit <= _unit_of(before, level, WIDE))).to(tl.int32), 0)
            o_count = _list_of(place + unit, entry, o_entry < whole, WIDE) * chunks + chunk
            for current in range(0, tl.max(part) + 1):
                m_part = m_entry & (part == current)
                left = tl.load(COUNTS + o_count, mask=m_part, other=0)
                target = tl.load(STARTS + o_count + 1, mask=m_part, other=0).to(tl.int64) - left
                if WIDE:
                    tl.store(COUNTS + o_count, left - 1, mask=m_part)
                    element = ((first_block + block) << UNIT_BITS) | (entry & ((1 << UNIT_BITS) - 1))
                    tl.store(OUT + target, element, mask=m_part)
                else:
                    bits = (entry & 0xFFFF).to(tl.int32)
                    low = (unit & ((1 << UNIT_BITS) - 1)).to(tl.int32)
                    tl.store(COUNTS + o_count, left - _count_bits(bits), mask=m_part)
                    for row in tl.static_range(ROWS):
                        kept = (bits >> row) & 1
                        element = (((first_block + block) * ROWS + row) << UNIT_BITS) | low
                        tl.store(OUT + target, element, mask=m_part & (kept != 0))
                        target += kept
                tl.debug_barrier()  # the next entries read what other threads wrote
