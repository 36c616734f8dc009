"""Parts of long lists, for the Triton kernels that sum over the rows that keep a key (gradients of keys, values).

Attention sinks are kept by nearly every row, most other keys by few: a program that takes all rows of a tile would be
the last to finish. Such *long* tiles are cut into parts, which come before all other tiles in the same launch. Their
sums are then added in a fixed order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import cdiv, item_span, next_power_of_2
from .triton_inverse import InverseLists, tile_range

PART_ROWS = 1024  # rows in a part of a tile, at least
PART_MEANS = 16  # times what a tile has on average: parts of this size are never too many
PART_SIZES = 8  # to choose from, up to that one


@dataclass(frozen=True)
class TileParts:
    """How the lists of long tiles of keys are cut for several programs. A tile that is not long has one program.

    Attributes:
        size: int32 ``[1]``, elements of a part, and the most of a tile that is not long.
        ends: int32 ``[tiles + 1]``, number of parts of all tiles before each.
        tile: int64 ``[bound]``, tile of each part; the number of tiles where there is no such part.
        tiles: number of tiles.
    """

    size: Tensor
    ends: Tensor
    tile: Tensor
    tiles: int

    def programs(self) -> int:
        """Of a kernel that finds its tile with ``part_of_program``."""
        return len(self.tile) + self.tiles

    def args(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Those of ``part_of_program``."""
        return self.tile, self.ends, self.size, len(self.tile), self.tiles


def cut_tiles(inverse: InverseLists, num_keys: int, tile_keys: int, heads: int, members: int) -> TileParts:
    """Parts of the tiles of ``tile_keys`` keys, each of which takes ``members`` neighbouring heads together.

    They are the smallest, of ``PART_SIZES`` sizes, of which there are few: at most ``2 tiles / PART_MEANS``.

    Args:
        inverse: the lists.
        num_keys: S.
        tile_keys: keys of a tile, a power of two; of lists that are not wide at most 32.
        heads: N * H, the query heads of all items.
        members: H / G; tile i is tile ``i % ceil(S / tile_keys)`` of key head ``i // ceil(S / tile_keys)``.
    """
    per_head = cdiv(num_keys, tile_keys)
    tiles = per_head * (heads // members)
    device = inverse.rows.device
    rows = torch.empty(tiles, dtype=torch.int32, device=device)
    _tile_rows_kernel[cdiv(per_head, 64), heads // members](
        inverse.offsets,
        rows,
        per_head,
        members,
        inverse.first_level,
        inverse.levels,
        inverse.units,
        KEYS=tile_keys,
        KINDS=inverse.kinds,
        TILES=64,
    )
    size = torch.empty(1, dtype=torch.int32, device=device)
    ends = torch.empty(tiles + 1, dtype=torch.int32, device=device)
    tile = torch.empty(2 * tiles // PART_MEANS, dtype=torch.int64, device=device)
    least = max(1, PART_ROWS // inverse.rows_each)
    sizes = {"MEANS": PART_MEANS, "SIZES": PART_SIZES, "TILES": 2048}
    _cut_kernel[(1,)](rows, size, ends, tile, tiles, len(tile), least, **sizes, num_warps=16)
    return TileParts(size, ends, tile, tiles)


def add_parts(
    parts: TileParts, sums: Tensor, grad_key: Tensor, grad_value: Tensor, spans: Tensor | None, scaling: float
) -> None:
    """Fill the gradients of the keys and values of long tiles.

    Args:
        parts: of the tiles.
        sums: float32 ``[bound, tile_keys, D + E]``, those of every part: of ``grad_key / scaling``, then of grad_value.
        grad_key: ``[N, G, S, D]``; the last dimension is contiguous, as that of grad_value is.
        grad_value: ``[N, G, S, E]``.
        spans: int32 ``[N, 2]`` of ``triton_common.item_spans``, or None.
        scaling: factor of the keys' gradients.
    """
    if not len(parts.tile):
        return
    batch, groups, num_keys, head_dim = grad_key.shape
    tensors = grad_key, grad_value
    _add_kernel[(len(parts.tile),)](
        sums,
        *tensors,
        parts.tile,
        parts.ends,
        spans,
        *(stride for tensor in tensors for stride in tensor.stride()[:3]),
        groups,
        num_keys,
        parts.tiles // (batch * groups),
        parts.tiles,
        scaling,
        HEAD_DIM=head_dim,
        VALUE_DIM=grad_value.shape[-1],
        WIDTH_PADDED=next_power_of_2(sums.shape[-1]),
        KEYS=sums.shape[1],
        HAS_PADDING=spans is not None,
    )


@triton.jit(do_not_specialize=["per_head", "members", "first_level", "levels", "units"])
def _tile_rows_kernel(
    OFFSETS,
    OUT,
    per_head,
    members,
    first_level,
    levels,
    units,
    KEYS: tl.constexpr,
    KINDS: tl.constexpr,
    TILES: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    o_tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    total = tl.zeros([TILES], tl.int64)
    for segment in range(0, members * levels):
        item_head, level = head * members + segment // levels, first_level + segment % levels
        begin, end = tile_range(OFFSETS, item_head, level, o_tile * KEYS, first_level, levels, units, KEYS, KINDS)
        total += end - begin
    tl.store(OUT + head * per_head + o_tile, total.to(tl.int32), mask=o_tile < per_head)


@triton.jit
def _count_parts(rows, sizes):
    """How many parts of each size tiles have with so many rows: none those that are not long."""
    return tl.where(rows > sizes, (rows + sizes - 1) // sizes, 0)


@triton.jit(do_not_specialize=["tiles", "bound", "least"])
def _cut_kernel(
    ROWS, SIZE, ENDS, PART_TILE, tiles, bound, least, MEANS: tl.constexpr, SIZES: tl.constexpr, TILES: tl.constexpr
):
    """Size of a part, and the places of the parts. One program: it reads one number per tile."""
    o_tile = tl.arange(0, TILES)
    total = tl.zeros([TILES], tl.int64)
    for begin in range(0, tiles, TILES):
        total += tl.load(ROWS + begin + o_tile, mask=begin + o_tile < tiles, other=0)
    sizes = tl.sum(total, 0) * MEANS * (tl.arange(0, SIZES) + 1) // (tiles * SIZES) + 1
    sizes = tl.maximum(sizes, least).to(tl.int32)
    parts = tl.zeros([SIZES], tl.int32)
    for begin in range(0, tiles, TILES):
        rows = tl.load(ROWS + begin + o_tile, mask=begin + o_tile < tiles, other=0)
        parts += tl.sum(_count_parts(rows[:, None], sizes[None, :]), 0)
    size = tl.min(tl.where((parts <= bound) | (sizes == tl.max(sizes, 0)), sizes, 2147483647), 0)
    tl.store(SIZE, size)
    tl.store(ENDS, 0)
    count = 0
    for begin in range(0, tiles, TILES):
        tile = begin + o_tile
        rows = tl.load(ROWS + tile, mask=tile < tiles, other=0)
        own = _count_parts(rows, size)
        end = count + tl.cumsum(own, 0)
        tl.store(ENDS + 1 + tile, end, mask=tile < tiles)
        for part in range(0, tl.max(own)):
            tl.store(PART_TILE + end - own + part, tile.to(tl.int64), mask=part < own)
        count += tl.sum(own, 0)
    for begin in range(count, bound, TILES):
        tl.store(PART_TILE + begin + o_tile, tiles, mask=begin + o_tile < bound)


@triton.jit
def part_of_program(PART_TILE, PART_ENDS, PART_SIZE, bound, tiles):
    """What a program of ``TileParts.programs`` takes: a tile, the range of its elements, and whether it is a part.

    The tile is -1 if there is nothing to do.
    """
    program = tl.program_id(0)
    is_part = program < bound
    tile = tl.where(is_part, tl.load(PART_TILE + program, mask=is_part, other=0).to(tl.int32), program - bound)
    exists = tile < tiles
    before = tl.load(PART_ENDS + tile, mask=exists, other=0)
    is_long = tl.load(PART_ENDS + tile + 1, mask=exists, other=0) > before
    tile = tl.where(exists & (is_long == is_part), tile, -1)
    size = tl.load(PART_SIZE)
    low = tl.where(is_part, (program - before) * size, 0)
    return tile, low, tl.where(is_part, low + size, 2147483647), is_part


@triton.jit
def store_rows(OUT, rows, m_row, stride, values, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Store ``values [ROWS, PADDED]`` at some rows of a matrix of ``DIM`` columns."""
    o_dim = tl.arange(0, PADDED)
    place = OUT + rows.to(tl.int64)[:, None] * stride + o_dim[None, :]
    tl.store(place, values.to(OUT.dtype.element_ty), mask=m_row[:, None] & (o_dim < DIM)[None, :])


@triton.jit(do_not_specialize=["num_keys", "per_head", "tiles", "scaling"])
def _add_kernel(
    SUMS,
    GRAD_K,
    GRAD_V,
    PART_TILE,
    PART_ENDS,
    SPANS,
    gk_item,
    gk_head,
    gk_row,
    gv_item,
    gv_head,
    gv_row,
    groups,
    num_keys,
    per_head,
    tiles,
    scaling,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    part = tl.program_id(0)
    tile = tl.load(PART_TILE + part)
    if tile == tiles:
        return
    if tl.load(PART_ENDS + tile) != part:  # the program of a tile's first part adds them all
        return
    item_group, first_key = tile // per_head, (tile % per_head) * KEYS
    item, group = item_group // groups, item_group % groups
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    WIDTH: tl.constexpr = HEAD_DIM + VALUE_DIM
    o_key, o_dim = tl.arange(0, KEYS), tl.arange(0, WIDTH_PADDED)[None, :]
    m_key = (first_key + o_key < real)[:, None]
    p_sum = SUMS + part.to(tl.int64) * (KEYS * WIDTH) + o_key[:, None] * WIDTH + o_dim
    total = tl.zeros([KEYS, WIDTH_PADDED], tl.float32)
    for _ in range(part, tl.load(PART_ENDS + tile + 1)):
        total += tl.load(p_sum, mask=m_key & (o_dim < WIDTH), other=0.0)
        p_sum += KEYS * WIDTH
    row = first + first_key + o_key.to(tl.int64)[:, None]
    p_k = GRAD_K + item * gk_item + group * gk_head + row * gk_row + o_dim
    tl.store(p_k, (total * scaling).to(GRAD_K.dtype.element_ty), mask=m_key & (o_dim < HEAD_DIM))
    p_v = GRAD_V + item * gv_item + group * gv_head + row * gv_row + (o_dim - HEAD_DIM)
    tl.store(p_v, total.to(GRAD_V.dtype.element_ty), mask=m_key & (o_dim >= HEAD_DIM) & (o_dim < WIDTH))
