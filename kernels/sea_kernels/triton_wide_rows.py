"""Attention of many neighbouring rows at a time to the aligned bins that they keep, for the Triton forms.

A block of up to 64 rows lists the bins that any of its rows keeps and walks their keys, which follow one another in
memory, in tiles that all its rows share. A row takes the keys of its own bins, as its bits say. Compared with the lists
of ``triton_entries.py``, which serve 16 rows, a tile is read by a quarter as many programs and fills wide matrix units;
in return a row meets more keys that others keep.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .masks import BinMask
from .triton_common import aligned_level, item_span, next_power_of_2, row_span
from .triton_wide_lists import TILE, WideLists, load_tile, rows_per_block, tile_start, visit_tile

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
    continues: bool = False,
) -> None:
    """Write softmax attention of every row to the keys of its bins.

    Args:
        query: ``[N, H, T, D]``; key: ``[N, G, S, D]``; value: ``[N, G, S, E]``, each with contiguous rows.
        mask: aligned bins.
        output: ``[N, H, T, E]``, contiguous.
        log_sums: None, or float32 ``[N, H, T]`` for log2 of each row's sum of exponentials.
        causal: whether a row sees only keys up to its own position.
        scaling: factor of the scores.
        spans: int32 ``[N, 2]`` of ``triton_common.item_spans``, or None.
        row_scale: None, or a factor of every row's result, ``[N, H, T]``.
        continues: ``output`` and ``log_sums`` hold the rows' attention to something else, which joins the softmax.
            -1e30 in ``log_sums`` stands for nothing, and is what an empty row leaves; without this flag it leaves 0.
    """
    batch, heads, num_queries, head_dim = query.shape
    value_dim = value.shape[-1]
    lists = WideLists(mask, key.shape[2], causal, spans, rows_per_block(query, value))
    row_bytes = max(head_dim, value_dim) * query.itemsize
    for chunk, whole_tile in lists.launches(row_bytes):
        entries = lists.build(*chunk)
        _walk_kernel[(chunk[1], batch * heads)](
            query,
            key,
            value,
            output,
            lists.bits,
            entries.packed,
            entries.meta,
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
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            HEAD_PADDED=max(16, next_power_of_2(head_dim)),
            VALUE_PADDED=max(16, next_power_of_2(value_dim)),
            TILE=TILE,
            WHOLE_TILE=whole_tile,
            CONTINUES=continues,
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


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_block", "num_levels", "scale"])
def _walk_kernel(
    Q,
    K,
    V,
    OUT,
    BITS,
    ENTRIES,
    META,
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
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    CONTINUES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, item_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    item, head = item_head // heads, item_head % heads
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = (first_block + block) * ROWS + tl.arange(0, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    m_row, seeing = rows < num_queries, length > 0
    m_value = (tl.arange(0, VALUE_PADDED) < VALUE_DIM)[None, :]
    row = item_head * num_queries + rows
    o_dim = tl.arange(0, HEAD_PADDED)
    p_q = Q + item * q_item + head * q_head + rows.to(tl.int64)[:, None] * q_row + o_dim[None, :]
    b_q = tl.load(p_q, mask=seeing[:, None] & (o_dim < HEAD_DIM)[None, :], other=0.0)  # [ROWS, HEAD]
    # With a factor of at least 0 the greatest product of a row gives its greatest score.
    b_q = tl.where(scale < 0, -b_q, b_q)
    scale = tl.abs(scale)
    p_out = OUT + row[:, None] * VALUE_DIM + tl.arange(0, VALUE_PADDED)[None, :]
    if CONTINUES:
        highest = tl.load(LOG_SUM + row, mask=m_row, other=-1e30)
        total = tl.where(highest > -1e29, 1.0, 0.0)
        acc = tl.load(p_out, mask=m_row[:, None] & m_value, other=0.0).to(tl.float32)
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
    p_words = BITS + row * (NUM_BINS // 32)

    # Tiles of one bin that all rows see whole: a row keeps all of their keys or none.
    steps = (whole << unit) // WHOLE_TILE
    start = tile_start(ENTRIES, 0, steps, unit, WHOLE_TILE)
    next_bin = tile_start(ENTRIES, 1, steps, unit, WHOLE_TILE) >> unit
    word = tl.load(p_words + (start >> unit >> 5), mask=seeing, other=0)
    for step in range(0, steps):
        keep = ((word >> ((start >> unit) & 31)) & 1) != 0
        # What a step needs comes one step early, and the bin of its words two, so that no step waits for them.
        word = tl.load(p_words + (next_bin >> 5), mask=seeing, other=0)
        next_bin = tile_start(ENTRIES, step + 2, steps, unit, WHOLE_TILE) >> unit
        o_key = start + tl.arange(0, WHOLE_TILE)
        start = tile_start(ENTRIES, step + 1, steps, unit, WHOLE_TILE)
        b_k = load_tile(K, o_key, None, k_row, HEAD_DIM, HEAD_PADDED)
        b_v = load_tile(V, o_key, None, v_row, VALUE_DIM, VALUE_PADDED)
        products = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        new_highest = tl.where(keep, tl.maximum(highest, tl.max(products, 1) * scale), highest)
        offset = tl.where(keep, new_highest, float("inf"))
        weights = tl.exp2(products * scale - offset[:, None])
        total, acc = _add_values(weights, b_v, tl.exp2(highest - new_highest), total, acc, PRECISION)
        highest = new_highest

    tiles = unit - 5  # log2 of an entry's
    for step in range(whole << tiles, count << tiles):
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
        log_sum = highest + tl.log2(total)
        if not CONTINUES:
            log_sum = tl.where(empty, 0.0, log_sum)
        tl.store(LOG_SUM + row, log_sum, mask=m_row)
    factor = 1.0 / total
    if ROW_SCALE is not None:
        factor *= tl.load(ROW_SCALE + row, mask=m_row, other=0.0).to(tl.float32)
    tl.store(p_out, (acc * factor[:, None]).to(OUT.dtype.element_ty), mask=m_row[:, None] & m_value)


@triton.jit
def _add_values(weights, b_v, rescale, total, acc, PRECISION: tl.constexpr):
    """Sums of weights [ROWS] and of weighted values [ROWS, VALUE] with those of a tile."""
    total = total * rescale + tl.sum(weights, 1)
    acc = acc * rescale[:, None] + tl.dot(weights.to(b_v.dtype), b_v, input_precision=PRECISION)
    return total, acc
