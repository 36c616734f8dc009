"""Lists of the aligned bins that many neighbouring rows keep, for the Triton kernels of both directions that walk them.

A block is up to 64 rows of one head. Its list has the bins that any of its rows keeps, as entries of at least a tile of
keys each. Which of its rows keep an entry is not in the list: their bits say so.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from .masks import BinMask
from .triton_common import aligned_level, cdiv, count_levels, item_span, next_power_of_2, row_span
from .triton_entries import LIST_BYTES, Entries, join_rows

TILE = 32  # keys at a time: their bins of any width lie in one word of a row's bits
TILE_LEVEL = 5  # log2 of them
LEAST_LEVEL = 3  # log2 of the keys of the smallest bins that wider tiles take without a mask per score
WIDE_TILE = 64  # keys at a time where bins are as wide, and all of their keys are valid
WIDE_TILE_BYTES = 128  # of a row of keys or values, at most: wider ones would need too much shared memory
MOST_STRIDE = 1 << 25  # between rows of keys or values, such that offsets within a tile fit into 32 bits
SPREAD = 8  # entries that a block has beside those of its rows' K bins, of which the widest may be two entries each
MOST_ROWS, MOST_BYTES = 64, 8192  # of a block of rows
BACKWARD_BYTES = 16384  # of a block in the backward pass, in half precision


def rows_per_block(query: Tensor, value: Tensor, most_bytes: int = MOST_BYTES) -> int:
    """Rows of a block, which are fewer if they are wide."""
    row_bytes = next_power_of_2(max(query.shape[-1], value.shape[-1])) * query.itemsize
    return max(16, min(MOST_ROWS, most_bytes // row_bytes))


def backward_rows(query: Tensor, value: Tensor) -> int:
    """Rows of a block in the backward pass: rows of 128 numbers still fit into registers, and fill the matrix units."""
    return rows_per_block(query, value, BACKWARD_BYTES if query.itemsize == 2 else MOST_BYTES)


class WideLists:
    """Sizes of the lists of a mask of aligned bins, and the launches that fill them.

    The lists come as :class:`Entries` whose ``packed``, int32, holds an entry's first key, a multiple of 32, plus log2
    of the keys of the bin, and whose ``meta``, int32 ``[N * H, blocks, 3]``, adds a number to theirs: how many entries,
    from the first on, the block's rows see whole. It is 0 in blocks whose rows' bins have several widths, or are
    smaller than ``whole_level`` says.

    Args:
        mask: aligned bins.
        num_keys: S.
        causal: whether a row sees only keys up to its own position.
        spans: int32 ``[N, 2]`` of ``triton_common.item_spans``, or None.
        rows: of a block.
        least_level: log2 of the keys of the smallest entry, 5 or 6.
        whole_level: log2 of the keys of the smallest bins in entries that count as whole, at least 1 if least_level
            is 6, since a word has bits for 32 bins of one key. Without it, entries of at least 32 keys are single bins,
            those of at least 64 have any.
    """

    def __init__(
        self,
        mask: BinMask,
        num_keys: int,
        causal: bool,
        spans: Tensor | None,
        rows: int,
        least_level: int = TILE_LEVEL,
        whole_level: int | None = None,
    ) -> None:
        self.bits, self.num_bins, self.num_keys = mask.bits.contiguous(), mask.num_bins, num_keys
        self.causal, self.spans, self.rows, self.least_level = causal, spans, rows, least_level
        default = TILE_LEVEL if least_level == TILE_LEVEL else 1
        self.whole_level = default if whole_level is None else whole_level
        self.batch, self.heads, self.num_queries, _ = mask.bits.shape
        self.blocks = cdiv(self.num_queries, rows)
        self.levels = count_levels(num_keys, mask.num_bins)
        self.capacity = 2 * mask.num_bins + SPREAD
        self.kept: list[Entries] = []  # by ``keep``

    def chunks(self) -> list[tuple[int, int]]:
        """(first block, number of blocks) of every launch."""
        per_launch = max(1, LIST_BYTES // (4 * self.capacity * self.batch * self.heads))
        return [(first, min(per_launch, self.blocks - first)) for first in range(0, self.blocks, per_launch)]

    def build(self, first_block: int, num_blocks: int) -> Entries:
        """The lists of some blocks."""
        grid = (num_blocks, self.batch * self.heads)
        entries = self.bits.new_empty(grid[1], num_blocks, self.capacity)
        meta = self.bits.new_empty(grid[1], num_blocks, 3)
        _list_kernel[grid](
            self.bits,
            entries,
            meta,
            self.spans,
            self.heads,
            self.num_queries,
            self.num_keys,
            first_block,
            self.levels,
            WORDS_PADDED=next_power_of_2(self.num_bins // 32),
            LEAST_LEVEL=self.least_level,
            WHOLE_LEVEL=self.whole_level,
            **self.flags(),
            num_warps=4,
        )
        return Entries(entries, meta, first_block)

    def keep(self) -> "WideLists":
        """The same object, with all lists built: 33 bytes per row of a head, with 256 bins and blocks of 64 rows."""
        self.kept = [self.build(*chunk) for chunk in self.chunks()]
        return self

    def entries(self) -> Iterator[Entries]:
        """All lists, of one launch at a time: those that are kept, or else built anew."""
        yield from self.kept or (self.build(*chunk) for chunk in self.chunks())

    def flags(self) -> dict:
        """Constants of every kernel that has to do with the lists."""
        flags = {"NUM_BINS": self.num_bins, "CAPACITY": self.capacity, "ROWS": self.rows, "CAUSAL": self.causal}
        return flags | {"HAS_PADDING": self.spans is not None}


def tile_and_least_level(row_bytes: int) -> tuple[int, int]:
    """Keys at a time where all rows see them, and log2 of the keys of the smallest bins that are taken so.

    Args:
        row_bytes: of the wider of keys and values.
    """
    return (WIDE_TILE, LEAST_LEVEL) if row_bytes <= WIDE_TILE_BYTES else (TILE, TILE_LEVEL)


def lists_of_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BinMask,
    *,
    causal: bool,
    spans: Tensor | None,
    rows: int | None = None,
) -> WideLists:
    """The lists that the kernels walk which take ``rows`` rows at a time, by default those of the forward pass."""
    _, least = tile_and_least_level(max(query.shape[-1], value.shape[-1]) * query.itemsize)
    return WideLists(mask, key.shape[2], causal, spans, rows or rows_per_block(query, value), whole_level=least)


def lists_of_both_passes(
    query: Tensor, key: Tensor, value: Tensor, mask: BinMask, *, causal: bool, spans: Tensor | None
) -> WideLists | None:
    """The lists that both passes walk, to be kept from one to the other; None if their blocks differ."""
    if rows_per_block(query, value) != backward_rows(query, value):
        return None
    return lists_of_blocks(query, key, value, mask, causal=causal, spans=spans).keep()


@triton.jit
def _either(left, right):
    return left | right


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_block", "num_levels"])
def _list_kernel(
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
    LEAST_LEVEL: tl.constexpr,
    WHOLE_LEVEL: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    """Entries: first key, a multiple of 32, plus log2 of the bin. Meta: how many, log2 of their keys, whole ones."""
    block, item_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, real = item_span(SPANS, item_head // heads, num_keys, HAS_PADDING)
    rows = (first_block + block) * ROWS + tl.arange(0, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    longest, shortest = tl.max(length), tl.min(tl.where(length > 0, length, 2147483647))
    low, high = tl.min(tl.where(length > 0, level, 31)), tl.max(level)
    unit = tl.maximum(low, LEAST_LEVEL)  # log2 of an entry's keys: a tile, or a wider bin
    place = item_head * tl.num_programs(0) + block
    WORDS: tl.constexpr = NUM_BINS // 32
    o_word, o_bin = tl.arange(0, WORDS_PADDED), tl.arange(0, WORDS_PADDED * 32)
    p_words = BITS + (item_head * num_queries + rows)[:, None] * WORDS + o_word[None, :]
    count, whole = 0, 0
    for current in range(low, high + 1):
        take = (length > 0) & (level == current)
        words = tl.load(p_words, mask=take[:, None] & (o_word < WORDS)[None, :], other=0)
        either = tl.reduce(words, 0, _either)
        kept = tl.reshape((either[:, None] >> tl.arange(0, 32)[None, :]) & 1, (WORDS_PADDED * 32,))
        start = o_bin << current
        packed = ((start >> unit).to(tl.int64) << 16) | kept
        joined = tl.associative_scan(packed, 0, join_rows, reverse=True)  # of bins smaller than an entry
        kept = tl.where(current < unit, (joined & 0xFFFF).to(tl.int32), kept)
        listed = (kept != 0) & ((start & ((1 << unit) - 1)) == 0) & (start < longest)
        parts = 1 << tl.maximum(current - unit, 0)
        size = tl.where(listed, parts, 0)
        target = count + tl.cumsum(size, 0) - size
        for part in range(0, parts):
            tl.store(ENTRIES + place * CAPACITY + target + part, start + (part << unit) + current, mask=listed)
        count += tl.sum(size, 0)
        whole += tl.sum((listed & (start + (1 << unit) <= shortest)).to(tl.int32), 0)
    tl.store(META + place * 3, count)
    tl.store(META + place * 3 + 1, unit)
    tl.store(META + place * 3 + 2, tl.where((low == high) & (low >= WHOLE_LEVEL), whole, 0))


@triton.jit
def seen_by_all(ENTRIES, count, whole, unit, length):
    """Keys along a block's list, from the first on, that all of its rows see.

    Beside the whole entries these are the first keys of the next, the bin at the rows' own positions.
    """
    shortest = tl.min(tl.where(length > 0, length, 2147483647))
    following = tl.load(ENTRIES + whole, mask=(whole > 0) & (whole < count), other=2147483647) & -32
    seen = (whole << unit) + tl.minimum(tl.maximum(shortest - following, 0), 1 << unit)
    return tl.where(whole > 0, seen, 0)


@triton.jit
def seen_by_any(ENTRIES, count, whole, unit, length):
    """Keys along a block's list up to the last that any of its rows sees, if the list ascends: it has whole entries."""
    last = tl.load(ENTRIES + count - 1, mask=whole > 0, other=0) & -32
    seen = ((count - 1) << unit) + tl.minimum(tl.max(length) - last, 1 << unit)
    return tl.where(whole > 0, seen, count << unit)


@triton.jit
def visit_tile(ENTRIES, p_words, step, tiles, length, level, TILE: tl.constexpr):
    """Keys of a tile of a block's list [TILE], and which rows keep them [ROWS, TILE].

    tiles: log2 of an entry's tiles.
    """
    o_tile = tl.arange(0, TILE)
    # As a vector, since Triton prefetches no tiles whose address depends on the load of a single number.
    entry = tl.load(ENTRIES + (step >> tiles) + o_tile * 0)
    o_key = (entry & -32) + ((step & ((1 << tiles) - 1)) << 5) + o_tile
    current = tl.max(entry & 31)
    return o_key, kept_of_tile(p_words, o_key, current, (length > 0) & (level == current), length)


@triton.jit
def rows_of_level(length, level, NUM_BINS: tl.constexpr):
    """Which rows have bins of ``2^level`` keys, for one ``level`` and without a loop."""
    shortest = tl.where(level > 0, NUM_BINS << tl.maximum(level - 1, 0), 0)
    return (length > shortest) & (length <= (NUM_BINS << level))


@triton.jit
def kept_of_tile(p_words, o_key, level, m_row, length):
    """Which rows keep the keys of a tile, if ``m_row`` are those whose bins have ``2^level`` keys. [ROWS, TILE]"""
    word = tl.load(p_words + (tl.min(o_key) >> level >> 5), mask=m_row, other=0)
    keep = (word[:, None] & (1 << ((o_key >> level) & 31))[None, :]) != 0
    return keep & (o_key[None, :] < length[:, None])


@triton.jit
def _tile_start(ENTRIES, step, steps, unit, TILE: tl.constexpr):
    """First key of a tile, of the last one if the step is past the end, some key of the first bin if there is none.

    unit: log2 of an entry's keys.
    """
    key = tl.minimum(step, steps - 1) * TILE  # counted along the list
    entry = tl.load(ENTRIES + (key >> unit), mask=steps > 0, other=0)
    return (entry & -32) + (key & ((1 << unit) - 1))


@triton.jit
def tile_starts(ENTRIES, step, steps, unit, ENTRY: tl.constexpr, HALVES: tl.constexpr):
    """First keys of the first and of the last entry of a tile, which has ``HALVES`` of them."""
    left = _tile_start(ENTRIES, step * HALVES, steps * HALVES, unit, ENTRY)
    return left, _tile_start(ENTRIES, step * HALVES + HALVES - 1, steps * HALVES, unit, ENTRY)


@triton.jit
def load_tile(BASE, o_key, m_key, stride, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a matrix for successive keys, all of them if there is no ``m_key``. [TILE, PADDED]"""
    o_tile, o_dim = tl.arange(0, o_key.shape[0]), tl.arange(0, PADDED)
    # One product for the tile: the others are the same for every tile.
    pointer = BASE + (o_key - o_tile).to(tl.int64)[:, None] * stride
    pointer += o_tile.to(tl.int64)[:, None] * stride + o_dim[None, :]
    m_dim = (o_dim < DIM)[None, :]
    if m_key is None:
        loaded = tl.load(pointer) if DIM == PADDED else tl.load(pointer, mask=m_dim, other=0.0)
    else:
        m_tile = m_key[:, None] if DIM == PADDED else m_key[:, None] & m_dim
        loaded = tl.load(pointer, mask=m_tile, other=0.0)
    return loaded


@triton.jit
def load_rows(BASE, o_key, stride, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a matrix, in one or two parts that follow one another. [TILE, PADDED]"""
    o_tile, o_dim = tl.arange(0, o_key.shape[0]), tl.arange(0, PADDED)
    # One product for a part: the others are the same for every tile. What a thread loads lies 16 rows apart, so that it
    # keeps one offset of its own.
    pointer = BASE + (o_key - o_tile).to(tl.int64)[:, None] * stride + (o_tile // 16 * 16)[:, None] * stride
    pointer += (o_tile % 16).to(tl.int64)[:, None] * stride + o_dim[None, :]
    return tl.load(pointer) if DIM == PADDED else tl.load(pointer, mask=(o_dim < DIM)[None, :], other=0.0)


@triton.jit
def keys_of_tile(left, right, ENTRY: tl.constexpr, HALVES: tl.constexpr):
    """Keys of a tile of one or two entries of ``ENTRY`` keys, whose first keys are given. [ENTRY * HALVES]"""
    o_tile = tl.arange(0, ENTRY * HALVES)
    # Which half a score belongs to is known when the kernel is compiled, for every register that holds one.
    return tl.where(o_tile < ENTRY, left, right - ENTRY * (HALVES - 1)) + o_tile


@triton.jit
def kept_bins(left, right, left_word, right_word, width, BINS: tl.constexpr, HALVES: tl.constexpr):
    """Which rows keep which of a tile's ``BINS`` bins of ``2^width`` keys, from the words that say so. [ROWS, BINS]"""
    o_bin = tl.arange(0, BINS)
    left_bits, right_bits = left_word >> ((left >> width) & 31), right_word >> ((right >> width) & 31)
    bits = tl.where((o_bin < BINS // HALVES)[None, :], left_bits[:, None], right_bits[:, None])
    return ((bits >> (o_bin % (BINS // HALVES))[None, :]) & 1) != 0


@triton.jit
def weights_of_bins(products, keep, log_sum, scale):
    """Weights [ROWS, TILE] of a tile's products, 0 in the bins that ``keep [ROWS, BINS]`` denies to a row."""
    ROWS: tl.constexpr = products.shape[0]
    TILE: tl.constexpr = products.shape[1]
    BINS: tl.constexpr = keep.shape[1]
    if BINS == 1:
        keep = tl.max(keep.to(tl.int32), 1) != 0
        weights = tl.exp2(products * scale - tl.where(keep, log_sum, float("inf"))[:, None])
    else:
        # Of every eight columns the matrix units leave two with each of four threads: all of one bin or of none.
        products = tl.reshape(products, (ROWS, BINS, TILE // BINS // 8, 8))
        offset = tl.where(keep[:, :, None], log_sum[:, None, None], float("inf"))
        offset = tl.broadcast_to(offset, (ROWS, BINS, 8))
        weights = tl.reshape(tl.exp2(products * scale - offset[:, :, None, :]), (ROWS, TILE))
    return weights
