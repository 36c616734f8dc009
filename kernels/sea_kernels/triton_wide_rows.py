"""Attention of many neighbouring rows at a time to the aligned bins that they keep, for the Triton forms.

A block of up to 64 rows lists the bins that any of its rows keeps and walks their keys, which follow one another in
memory, in tiles that all its rows share. A row takes the keys of its own bins, as its bits say. Compared with the lists
of ``triton_entries.py``, which serve 16 rows, a tile is read by a quarter as many programs and fills wide matrix units;
in return a row meets more keys that others keep. In the far field the same program begins with the pooled bins that its
rows do not keep.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .masks import BinMask
from .triton_common import aligned_level, item_span, next_power_of_2, row_span
from .triton_pooled_bins import take_pooled_bins
from .triton_wide_lists import (
    MOST_STRIDE,
    TILE,
    WideLists,
    kept_bins,
    keys_of_tile,
    lists_of_blocks,
    load_rows,
    load_tile,
    seen_by_all,
    seen_by_any,
    tile_and_least_level,
    tile_starts,
    visit_tile,
    weights_of_bins,
)

LOG2E = 1.4426950408889634


def attend_in_bins(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BinMask,
    output: Tensor,
    log_sums: Tensor | None,
    *,
    causal: bool,
    scaling: float,
    spans: Tensor | None,
    row_scale: Tensor | None = None,
    pooled: tuple[Tensor, Tensor, Tensor] | None = None,
    lists: WideLists | None = None,
) -> None:
    """Write softmax attention of every row to the keys of its bins, and 0 where it has none, in ``log_sums`` too.

    Args:
        query: ``[N, H, T, D]``; key: ``[N, G, S, D]``; value: ``[N, G, S, E]``, each with contiguous rows.
        mask: aligned bins.
        output: ``[N, H, T, E]``, contiguous.
        log_sums: None, or float32 ``[N, H, T]`` for log2 of each row's sum of exponentials.
        causal: whether a row sees only keys up to its own position.
        scaling: factor of the scores.
        spans: int32 ``[N, 2]`` of ``triton_common.item_spans``, or None.
        row_scale: None, or a factor of every row's result, ``[N, H, T]``.
        pooled: None, or keys, values and offsets of the far field's bins of all widths: a row's softmax then has those
            of its own width that it does not keep beside its keys.
        lists: of ``lists_of_blocks``, if the backward pass walks them too; None to build and drop them.
    """
    batch, heads, num_queries, head_dim = query.shape
    value_dim = value.shape[-1]
    row_bytes = max(head_dim, value_dim) * query.itemsize
    tile, least = tile_and_least_level(row_bytes)
    if lists is None:
        lists = lists_of_blocks(query, key, value, mask, causal=causal, spans=spans)
    key, value = (x if x.stride(2) <= MOST_STRIDE else x.contiguous() for x in (key, value))
    if scaling < 0:  # with a factor of at least 0 the greatest product of a row gives its greatest score
        query, scaling = -query, -scaling
    for entries in lists.entries():
        _walk_kernel[(entries.meta.shape[1], batch * heads)](
            query,
            key,
            value,
            output,
            lists.bits,
            entries.packed,
            entries.meta,
            *(pooled or (None, None, None)),
            spans,
            row_scale if row_scale is None else row_scale.contiguous(),
            log_sums,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            heads // key.shape[1],
            heads,
            num_queries,
            lists.num_keys,
            entries.first_block,
            lists.levels,
            scaling * LOG2E,
            scaling,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            HEAD_PADDED=max(16, next_power_of_2(head_dim)),
            VALUE_PADDED=max(16, next_power_of_2(value_dim)),
            TILE=TILE,
            WHOLE_TILE=tile,
            BIN_TILE=tile if lists.num_bins % tile == 0 else TILE,
            LEAST_LEVEL=least,
            LEVELS=min(lists.levels, tile.bit_length()),
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            **lists.flags(),
            **_launch_config(query.dtype, row_bytes),
        )


def _launch_config(dtype: torch.dtype, row_bytes: int) -> dict:
    """Launch parameters; ``row_bytes`` of the wider of keys and values."""
    if dtype.itemsize > 2:  # without matrix units the products take many registers
        return {"num_warps": 8, "num_stages": 2, "maxnreg": 255}
    # Three stages load a tile while another is in use. Of 128 registers four programs share a multiprocessor, of 168
    # three.
    registers = 128 if row_bytes <= 128 else 168 if row_bytes <= 256 else 255
    return {"num_warps": 4, "num_stages": 3, "maxnreg": registers}


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_block", "num_levels", "scale", "scaling"])
def _walk_kernel(
    Q,
    K,
    V,
    OUT,
    BITS,
    ENTRIES,
    META,
    BIN_K,
    BIN_V,
    BIN_OFFSET,
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
    heads_per_group,
    heads,
    num_queries,
    num_keys,
    first_block,
    num_levels,
    scale,
    scaling,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE_TILE: tl.constexpr,
    BIN_TILE: tl.constexpr,
    LEAST_LEVEL: tl.constexpr,
    LEVELS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys come first
    item_head = tl.program_id(1).to(tl.int64)
    item, head = item_head // heads, item_head % heads
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = (first_block + block) * ROWS + tl.arange(0, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    m_row, seeing = rows < num_queries, length > 0
    row = item_head * num_queries + rows
    o_dim = tl.arange(0, HEAD_PADDED)
    p_q = Q + item * q_item + head * q_head + rows.to(tl.int64)[:, None] * q_row + o_dim[None, :]
    b_q = tl.load(p_q, mask=seeing[:, None] & (o_dim < HEAD_DIM)[None, :], other=0.0)  # [ROWS, HEAD]
    p_words = BITS + row * (NUM_BINS // 32)
    if BIN_K is not None:
        highest, total, acc = take_pooled_bins(
            b_q, BIN_K, BIN_V, BIN_OFFSET, item_head, num_levels, scaling, p_words, seeing, length, level,
            0, HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED, NUM_BINS, BIN_TILE, PRECISION,
        )  # fmt: skip
    else:
        highest = tl.full([ROWS], -1e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, VALUE_PADDED], tl.float32)

    K += item * k_item + (head // heads_per_group) * k_head + first.to(tl.int64) * k_row
    V += item * v_item + (head // heads_per_group) * v_head + first.to(tl.int64) * v_row
    place = item_head * tl.num_programs(0) + block
    ENTRIES += place * CAPACITY
    unit = tl.load(META + place * 3 + 1)  # log2 of an entry's keys
    count, whole = tl.load(META + place * 3), tl.load(META + place * 3 + 2)

    # Tiles that all rows see whole. Each width of bins has a loop of its own, all that fill a tile have the last one.
    seen = seen_by_all(ENTRIES, count, whole, unit, length)
    taken = whole * 0  # keys along the list
    width = tl.load(ENTRIES, mask=whole > 0, other=0) & 31  # log2 of the bins' keys
    for own in tl.static_range(LEAST_LEVEL, LEVELS):
        if (width == own) | ((width > own) & (own == LEVELS - 1)):
            steps = seen // WHOLE_TILE
            taken = steps * WHOLE_TILE
            highest, total, acc = _take_whole_bins(
                b_q, K, V, k_row, v_row, scale, ENTRIES, p_words, seeing, steps, width, highest, total, acc,
                own, HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED, WHOLE_TILE, PRECISION,
            )  # fmt: skip

    tiles = unit - 5  # log2 of an entry's
    seen = seen_by_any(ENTRIES, count, whole, unit, length)
    for step in range(taken // TILE, tl.cdiv(seen, TILE)):
        o_key, keep = visit_tile(ENTRIES, p_words, step, tiles, length, level, TILE)
        b_k = load_tile(K, o_key, o_key < real, k_row, HEAD_DIM, HEAD_PADDED)
        b_v = load_tile(V, o_key, o_key < real, v_row, VALUE_DIM, VALUE_PADDED)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        scores = tl.where(keep, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        total, acc = _add_values(weights, b_v, tl.exp2(highest - new_highest), total, acc, PRECISION)
        highest = new_highest

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    if LOG_SUM is not None:
        tl.store(LOG_SUM + row, tl.where(empty, 0.0, highest + tl.log2(total)), mask=m_row)
    factor = 1.0 / total
    if ROW_SCALE is not None:
        factor *= tl.load(ROW_SCALE + row, mask=m_row, other=0.0).to(tl.float32)
    o_value = tl.arange(0, VALUE_PADDED)
    m_out = m_row[:, None] & (o_value < VALUE_DIM)[None, :]
    p_out = OUT + row[:, None] * VALUE_DIM + o_value[None, :]
    tl.store(p_out, (acc * factor[:, None]).to(OUT.dtype.element_ty), m_out)


@triton.jit
def _take_whole_bins(
    b_q,
    K,
    V,
    k_row,
    v_row,
    scale,
    LIST,
    p_words,
    seeing,
    steps,
    width,
    highest,
    total,
    acc,
    LEVEL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Go on with the softmax over tiles of one or two entries, of whose bins a row keeps all keys or none.

    steps: tiles, from the first entry on.
    width: log2 of the bins' keys, LEVEL or, if that fills a tile, more.
    """
    ENTRY: tl.constexpr = min(TILE, max(32, 1 << LEVEL))
    HALVES: tl.constexpr = TILE // ENTRY  # entries of a tile: left and right, which are the same if there is one
    BIN: tl.constexpr = min(TILE, 1 << LEVEL)
    BINS: tl.constexpr = TILE // BIN
    if BIN < TILE:
        width = width * 0 + LEVEL
    unit = tl.maximum(width, 5)
    left, right = tile_starts(LIST, 0, steps, unit, ENTRY, HALVES)
    next_left, next_right = tile_starts(LIST, 1, steps, unit, ENTRY, HALVES)
    left_word = tl.load(p_words + (left >> width >> 5), mask=seeing, other=0)
    right_word = tl.load(p_words + (right >> width >> 5), mask=seeing, other=0)
    for step in range(0, steps):
        o_key = keys_of_tile(left, right, ENTRY, HALVES)
        keep = kept_bins(left, right, left_word, right_word, width, BINS, HALVES)
        # What a step needs comes one step early, and the bins of its words two, so that no step waits for them.
        left_word = tl.load(p_words + (next_left >> width >> 5), mask=seeing, other=0)
        right_word = tl.load(p_words + (next_right >> width >> 5), mask=seeing, other=0)
        left, right = tile_starts(LIST, step + 1, steps, unit, ENTRY, HALVES)
        next_left, next_right = tile_starts(LIST, step + 2, steps, unit, ENTRY, HALVES)
        b_k = load_rows(K, o_key, k_row, HEAD_DIM, HEAD_PADDED)
        b_v = load_rows(V, o_key, v_row, VALUE_DIM, VALUE_PADDED)
        products = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        new_highest = _highest_of_bins(products, keep, highest, scale)
        weights = weights_of_bins(products, keep, new_highest, scale)
        total, acc = _add_values(weights, b_v, tl.exp2(highest - new_highest), total, acc, PRECISION)
        highest = new_highest
    return highest, total, acc


@triton.jit
def _highest_of_bins(products, keep, highest, scale):
    """New maxima [ROWS] after a tile of bins, if ``keep [ROWS, BINS]`` says who keeps which."""
    ROWS: tl.constexpr = products.shape[0]
    TILE: tl.constexpr = products.shape[1]
    BINS: tl.constexpr = keep.shape[1]
    if BINS == 1:
        greatest, keep = tl.max(products, 1), tl.max(keep.to(tl.int32), 1) != 0
        highest = tl.where(keep, tl.maximum(highest, greatest * scale), highest)
    else:
        # Of every eight columns the matrix units leave two with each of four threads, which reduce their own first.
        products = tl.reshape(products, (ROWS, BINS, TILE // BINS // 8, 8))
        greatest = tl.where(keep[:, :, None], tl.max(products, 2), float("-inf"))
        greatest = tl.max(tl.max(greatest, 1), 1)
        highest = tl.where(greatest > float("-inf"), tl.maximum(highest, greatest * scale), highest)
    return highest


@triton.jit
def _add_values(weights, b_v, rescale, total, acc, PRECISION: tl.constexpr):
    """Sums of weights [ROWS] and of weighted values [ROWS, VALUE] with those of a tile."""
    total = total * rescale + tl.sum(weights, 1)
    acc = acc * rescale[:, None] + tl.dot(weights.to(b_v.dtype), b_v, input_precision=PRECISION)
    return total, acc
