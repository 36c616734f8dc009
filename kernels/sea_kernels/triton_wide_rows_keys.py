"""Gradients to the keys and values of the aligned bins that many neighbouring rows at a time keep.

A program takes a tile of keys of one key head and walks the blocks of rows that list it, which ``triton_inverse.py``
finds, for every query head that reads the keys. Tiles with long lists are cut into parts whose sums are added in a
fixed order. The sums are kept transposed, so that a product's first factor has as many rows as the matrix units want.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .masks import BinMask, mask_of_heads
from .triton_common import cdiv, item_span, next_power_of_2, row_span
from .triton_inverse import MOST_CHUNKS, UNIT_BITS, InverseLists, cut_tiles, tile_range
from .triton_wide_lists import TILE, WideLists, backward_rows, kept_of_tile, rows_of_level

LOG2E = 1.4426950408889634
BUFFER_BYTES = 1 << 29  # about, of the lists of the heads that are taken together


def differentiate_keys_in_bins(
    query: Tensor,
    grad_output: Tensor,
    log_sums: Tensor,
    delta: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BinMask,
    grad_key: Tensor,
    grad_value: Tensor,
    *,
    causal: bool,
    scaling: float,
    spans: Tensor | None,
    row_scale: Tensor | None = None,
) -> None:
    """Fill ``grad_key`` and ``grad_value`` at real keys.

    Args:
        query: ``[N, H, T, D]``; its last dimension is contiguous, as those of grad_output, key and value are.
        grad_output: ``[N, H, T, E]``.
        log_sums: float32 ``[N, H, T]``, contiguous, log2 of each row's sum of exponentials.
        delta: float32 ``[N, H, T]``, contiguous, product of grad_output and output.
        key: ``[N, G, S, D]``.
        value: ``[N, G, S, E]``.
        mask: aligned bins.
        grad_key: like key.
        grad_value: like value.
        causal: whether a row sees only keys up to its own position.
        scaling: factor of the scores.
        spans: int32 ``[N, 2]`` of ``triton_common.item_spans``, or None.
        row_scale: None, or float32 ``[N, H, T]``, contiguous, factor of every row's result.
    """
    members, rows = query.shape[1] // key.shape[1], backward_rows(query, value)
    whole = WideLists(mask, key.shape[2], causal, spans, rows)
    for groups in _slices(whole, key.shape[1], members):
        heads = slice(groups.start * members, groups.stop * members)
        lists = WideLists(mask_of_heads(mask, heads), key.shape[2], causal, spans, rows)
        own = (None if x is None else x[:, heads] for x in (query, grad_output, log_sums, delta, row_scale))
        _differentiate(*own, *(x[:, groups] for x in (key, value, grad_key, grad_value)), lists, scaling)


def _slices(lists: WideLists, groups: int, members: int) -> Iterator[slice]:
    """Key heads to be taken together, so that their lists stay small."""
    # Every entry comes again in a tile's list, and a table sorts them.
    size = 8 * lists.capacity * (lists.blocks + MOST_CHUNKS * lists.levels)
    at_once = max(1, BUFFER_BYTES // (lists.batch * members * size))
    for first in range(0, groups, at_once):
        yield slice(first, min(first + at_once, groups))


def _differentiate(
    query: Tensor,
    grad_output: Tensor,
    log_sums: Tensor,
    delta: Tensor,
    row_scale: Tensor | None,
    key: Tensor,
    value: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    lists: WideLists,
    scaling: float,
) -> None:
    batch, heads, num_queries, head_dim = query.shape
    groups, num_keys, value_dim = value.shape[1:]
    inverse = InverseLists(lists, [lists.build(*chunk) for chunk in lists.chunks()])
    parts = cut_tiles(inverse, num_keys, TILE, batch * heads, heads // groups)
    sums = log_sums.new_empty(len(parts.tile), head_dim + value_dim, TILE)
    tiles, tensors = cdiv(num_keys, TILE), (query, key, value, grad_output, grad_key, grad_value)
    all_tiles = batch * groups * tiles
    args = [*tensors, log_sums, delta, row_scale, lists.bits, lists.spans]
    args += [inverse.rows, inverse.offsets, parts.size, parts.ends, parts.tile, sums]
    args += [stride for tensor in tensors for stride in tensor.stride()[:3]]
    args += [*log_sums.stride()[:2], groups, heads // groups, num_queries, num_keys, tiles, all_tiles]
    args += [inverse.first_level, inverse.levels, inverse.units, scaling * LOG2E, scaling]
    options = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "HEAD_PADDED": max(16, next_power_of_2(head_dim)),
        "VALUE_PADDED": max(16, next_power_of_2(value_dim)),
        "NUM_BINS": lists.num_bins,
        "ROWS": lists.rows,
        "TILE": TILE,
        "UNIT_BITS": UNIT_BITS,
        "CAUSAL": lists.causal,
        "HAS_PADDING": lists.spans is not None,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    } | _launch_config(query.dtype, max(head_dim, value_dim) * query.itemsize)
    if len(parts.tile):
        _key_kernel[len(parts.tile),](*args, **options, EXTRA=True)
    _key_kernel[all_tiles,](*args, **options, EXTRA=False)


def _launch_config(dtype: torch.dtype, row_bytes: int) -> dict:
    """Launch parameters for the wider of query and value, such that three or two programs share a multiprocessor."""
    narrow = dtype.itemsize == 2 and row_bytes <= 128
    config = {"num_warps": 4 if dtype.itemsize == 2 and row_bytes <= 256 else 8}
    # Rows come by way of a list: it takes five stages to load some while others are in use.
    return config | {"num_stages": 5 if narrow else 3, "maxnreg": 168 if narrow else None}


@triton.jit(
    do_not_specialize=[
        "r_item",
        "r_head",
        "num_queries",
        "num_keys",
        "tiles",
        "all_tiles",
        "first_level",
        "levels",
        "units",
        "scale",
        "scaling",
    ]
)
def _key_kernel(
    Q,
    K,
    V,
    GRAD_OUT,
    GRAD_K,
    GRAD_V,
    LOG_SUM,
    DELTA,
    ROW_SCALE,
    BITS,
    SPANS,
    LISTED,
    OFFSETS,
    PART_SIZE,
    PART_ENDS,
    PART_TILE,
    SUMS,
    q_item,
    q_head,
    q_row,
    k_item,
    k_head,
    k_row,
    v_item,
    v_head,
    v_row,
    g_item,
    g_head,
    g_row,
    gk_item,
    gk_head,
    gk_row,
    gv_item,
    gv_head,
    gv_row,
    r_item,
    r_head,
    groups,
    members,
    num_queries,
    num_keys,
    tiles,
    all_tiles,
    first_level,
    levels,
    units,
    scale,
    scaling,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    UNIT_BITS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """Sums of the first part of every tile, plus those of its extra parts, which ``EXTRA`` programs left in SUMS."""
    program = tl.program_id(0)
    place, size = program, tl.load(PART_SIZE)
    low, high = size * 0, size
    if EXTRA:
        place = tl.load(PART_TILE + program).to(tl.int32)
        exists = place < all_tiles
        place = tl.where(exists, place, 0)
        low = (program - tl.load(PART_ENDS + place) + 1) * size
        high = tl.where(exists, low + size, low)
    item_group, tile = (place // tiles).to(tl.int64), place % tiles
    item, group = item_group // groups, item_group % groups
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    o_tile, o_row = tl.arange(0, TILE), tl.arange(0, ROWS)
    o_key = tile * TILE + o_tile
    m_key = o_key < real
    o_dim, o_value = tl.arange(0, HEAD_PADDED), tl.arange(0, VALUE_PADDED)
    m_dim, m_value = (o_dim < HEAD_DIM)[None, :], (o_value < VALUE_DIM)[None, :]
    key_row = (first + o_key).to(tl.int64)[:, None]
    p_k = K + item * k_item + group * k_head + key_row * k_row + o_dim[None, :]
    b_k = tl.load(p_k, mask=m_key[:, None] & m_dim, other=0.0)  # [TILE, HEAD]
    p_v = V + item * v_item + group * v_head + key_row * v_row + o_value[None, :]
    b_v = tl.load(p_v, mask=m_key[:, None] & m_value, other=0.0)  # [TILE, VALUE]
    grad_k = tl.zeros([HEAD_PADDED, TILE], tl.float32)
    grad_v = tl.zeros([VALUE_PADDED, TILE], tl.float32)
    seen = item_group * 0  # blocks in the lists so far
    for segment in range(0, members * levels):
        head = group * members + segment // levels
        item_head = item_group * members + segment // levels
        unit = first_level + segment % levels
        begin, end = tile_range(OFFSETS, item_head, unit, tile * TILE, first_level, levels, units, TILE)
        start = begin + tl.maximum(low - seen, 0)
        stop = tl.minimum(end, begin + (high - seen))
        seen += end - begin
        p_q = Q + item * q_item + head * q_head + o_dim[None, :]
        p_do = GRAD_OUT + item * g_item + head * g_head + o_value[None, :]
        row_place = item * r_item + head * r_head
        for step in range(0, tl.maximum(stop - start, 0).to(tl.int32)):
            # As a vector, since Triton prefetches no rows whose address depends on the load of a single number.
            element = tl.load(LISTED + start + step + o_row * 0)
            level = tl.max(element & ((1 << UNIT_BITS) - 1))
            rows = (element >> UNIT_BITS) * ROWS + o_row
            m_row, long_rows = rows < num_queries, rows.to(tl.int64)[:, None]
            b_q = tl.load(p_q + long_rows * q_row, mask=m_row[:, None] & m_dim, other=0.0)  # [ROWS, HEAD]
            b_do = tl.load(p_do + long_rows * g_row, mask=m_row[:, None] & m_value, other=0.0)  # [ROWS, VALUE]
            log_sum = tl.load(LOG_SUM + row_place + rows, mask=m_row, other=0.0)
            delta = tl.load(DELTA + row_place + rows, mask=m_row, other=0.0)
            _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
            p_words = BITS + (item_head * num_queries + rows) * (NUM_BINS // 32)
            keep = kept_of_tile(p_words, o_key, level, rows_of_level(length, level, NUM_BINS), length)
            scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale  # [ROWS, TILE]
            weights = tl.exp2(tl.where(keep, scores - log_sum[:, None], float("-inf")))
            products = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            shares = weights
            if ROW_SCALE is not None:
                factor = tl.load(ROW_SCALE + row_place + rows, mask=m_row, other=0.0)[:, None]
                products *= factor
                shares *= factor
            grad_v += tl.dot(tl.trans(b_do), shares.to(b_do.dtype), input_precision=PRECISION)
            grad_scores = weights * (products - delta[:, None])
            grad_k += tl.dot(tl.trans(b_q), grad_scores.to(b_q.dtype), input_precision=PRECISION)

    WIDTH: tl.constexpr = HEAD_DIM + VALUE_DIM
    o_k, o_v = o_dim[:, None] * TILE + o_tile[None, :], (HEAD_DIM + o_value)[:, None] * TILE + o_tile[None, :]
    m_k, m_v = (o_dim < HEAD_DIM)[:, None], (o_value < VALUE_DIM)[:, None]
    if EXTRA:
        SUMS += program.to(tl.int64) * (TILE * WIDTH)
        tl.store(SUMS + o_k, grad_k, mask=m_k)
        tl.store(SUMS + o_v, grad_v, mask=m_v)
    else:
        extra = tl.load(PART_ENDS + place)
        SUMS += extra.to(tl.int64) * (TILE * WIDTH)
        for _ in range(extra, tl.load(PART_ENDS + place + 1)):
            grad_k += tl.load(SUMS + o_k, mask=m_k, other=0.0)
            grad_v += tl.load(SUMS + o_v, mask=m_v, other=0.0)
            SUMS += TILE * WIDTH
        p_k = GRAD_K + item * gk_item + group * gk_head + key_row * gk_row + o_dim[None, :]
        grad_k = tl.trans(grad_k * scaling).to(GRAD_K.dtype.element_ty)
        tl.store(p_k, grad_k, mask=m_key[:, None] & m_dim)
        p_v = GRAD_V + item * gv_item + group * gv_head + key_row * gv_row + o_value[None, :]
        tl.store(p_v, tl.trans(grad_v).to(GRAD_V.dtype.element_ty), mask=m_key[:, None] & m_value)
