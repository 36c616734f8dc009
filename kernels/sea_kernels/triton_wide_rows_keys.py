"""Gradients to the keys and values of the aligned bins that many neighbouring rows at a time keep.

A program takes a tile of keys of one key head and walks the blocks of rows that list it, which ``triton_inverse.py``
finds, for every query head that reads the keys. Long lists are cut into parts (``triton_parts.py``). Weights have a row
for every key, so that they are first factors of the products without leaving their registers, and as many rows as the
matrix units want.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .masks import BinMask, mask_of_heads
from .triton_common import aligned_level, cdiv, item_span, load_row_numbers, next_power_of_2
from .triton_inverse import KINDS, MOST_CHUNKS, UNIT_BITS, InverseLists
from .triton_parts import add_parts, cut_tiles, part_of_program, store_rows
from .triton_wide_lists import WideLists, load_tile, rows_of_level, rows_per_block

KEYS, KEYS_LEVEL = 64, 6  # of a tile, and log2 of them
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
    members, rows = query.shape[1] // key.shape[1], rows_per_block(query, value)
    whole = WideLists(mask, key.shape[2], causal, spans, rows, KEYS_LEVEL)
    for groups in _slices(whole, key.shape[1], members):
        if groups == slice(0, key.shape[1]):  # all at once, as long as inputs are not very long
            tensors = query, grad_output, log_sums, delta, row_scale, key, value, grad_key, grad_value
            _differentiate(*tensors, whole, scaling)
            continue
        heads = slice(groups.start * members, groups.stop * members)
        lists = WideLists(mask_of_heads(mask, heads), key.shape[2], causal, spans, rows, KEYS_LEVEL)
        own = (None if x is None else x[:, heads] for x in (query, grad_output, log_sums, delta, row_scale))
        _differentiate(*own, *(x[:, groups] for x in (key, value, grad_key, grad_value)), lists, scaling)


def _slices(lists: WideLists, groups: int, members: int) -> Iterator[slice]:
    """Key heads to be taken together, so that their lists stay small."""
    # Every entry comes again in a tile's list, and a table with two numbers for each of a unit's lists sorts them.
    size = 8 * lists.capacity * (lists.blocks + KINDS * MOST_CHUNKS * lists.levels // 2)
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
    parts = cut_tiles(inverse, num_keys, KEYS, batch * heads, heads // groups)
    sums = log_sums.new_empty(len(parts.tile), KEYS, head_dim + value_dim)
    tiles, tensors = cdiv(num_keys, KEYS), (query, key, value, grad_output, grad_key, grad_value)
    args = [*tensors, log_sums, delta, row_scale, lists.bits, lists.spans]
    args += [inverse.rows, inverse.offsets, *parts.args(), sums]
    args += [stride for tensor in tensors for stride in tensor.stride()[:3]]
    args += [*log_sums.stride()[:2], groups, heads // groups, num_queries, num_keys, tiles]
    args += [inverse.first_level, inverse.levels, inverse.units, scaling * LOG2E, scaling]
    options = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "HEAD_PADDED": max(16, next_power_of_2(head_dim)),
        "VALUE_PADDED": max(16, next_power_of_2(value_dim)),
        "NUM_BINS": lists.num_bins,
        "ROWS": lists.rows,
        "TILE": KEYS,
        "UNIT_BITS": UNIT_BITS,
        "CAUSAL": lists.causal,
        "HAS_PADDING": lists.spans is not None,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    } | _launch_config(query.dtype, max(head_dim, value_dim) * query.itemsize)
    _key_kernel[parts.programs(),](*args, **options)
    add_parts(parts, sums, grad_key, grad_value, lists.spans, scaling)


def _launch_config(dtype: torch.dtype, row_bytes: int) -> dict:
    """Launch parameters; ``row_bytes`` of the wider of queries and values."""
    narrow = dtype.itemsize == 2 and row_bytes <= 256
    return {"num_warps": 4 if narrow else 8, "num_stages": 3, "maxnreg": 255}


@triton.jit(
    do_not_specialize=[
        "r_item",
        "r_head",
        "num_queries",
        "num_keys",
        "tiles",
        "bound",
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
    PART_TILE,
    PART_ENDS,
    PART_SIZE,
    bound,
    all_tiles,
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
):
    """Gradients of a tile that is not long, or SUMS of a part."""
    place, low, high, is_part = part_of_program(PART_TILE, PART_ENDS, PART_SIZE, bound, all_tiles)
    if place < 0:
        return
    item_group, tile = (place // tiles).to(tl.int64), place % tiles
    item, group = item_group // groups, item_group % groups
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    o_tile, o_row = tl.arange(0, TILE), tl.arange(0, ROWS)
    o_key = tile * TILE + o_tile
    m_key = o_key < real
    K += item * k_item + group * k_head + first.to(tl.int64) * k_row
    V += item * v_item + group * v_head + first.to(tl.int64) * v_row
    b_k = load_tile(K, o_key, m_key, k_row, HEAD_DIM, HEAD_PADDED)  # [TILE, HEAD]
    b_v = load_tile(V, o_key, m_key, v_row, VALUE_DIM, VALUE_PADDED)  # [TILE, VALUE]
    grad_k = tl.zeros([TILE, HEAD_PADDED], tl.float32)
    grad_v = tl.zeros([TILE, VALUE_PADDED], tl.float32)
    before = num_keys - num_queries - first  # position of the first row
    low_row, high_row = tl.maximum(-before, 0), tl.minimum(num_queries, real - before)  # rows outside see no keys
    # Blocks of rows with smaller bins than 2^least keys do not see the tile. From here on levels are the lists'.
    least = tl.maximum(aligned_level(tile * TILE - ROWS + 1, first_level + levels, NUM_BINS) - first_level, 0)
    seen = item_group * 0  # blocks in the lists so far
    for segment in range(0, members * (levels - least)):
        member, level = segment // (levels - least), least + segment % (levels - least)
        head, item_head, unit = group * members + member, item_group * members + member, first_level + level
        p_q, p_do = Q + item * q_item + head * q_head, GRAD_OUT + item * g_item + head * g_head
        p_words = BITS + item_head * num_queries * (NUM_BINS // 32)
        row_place = item * r_item + head * r_head
        p_list = OFFSETS + ((item_head * levels + level) * units + ((tile * TILE) >> unit)) * 2
        end, ends = tl.load(p_list).to(tl.int64), (tl.load(p_list + 1), tl.load(p_list + 2))
        # The rows of the second list see whole all bins that they keep, which have 16 keys or more.
        for whole in tl.static_range(2):
            begin, end = end, ends[whole].to(tl.int64)
            start, stop = begin + tl.maximum(low - seen, 0), tl.minimum(end, begin + (high - seen))
            count = tl.maximum(stop - start, 0).to(tl.int32)
            seen += end - begin
            element = tl.load(LISTED + start, mask=count > 0, other=0)
            for step in range(0, count):
                bin_level, first_row = element & ((1 << UNIT_BITS) - 1), (element >> UNIT_BITS) * ROWS
                rows = first_row + o_row
                m_row = (rows >= low_row) & (rows < high_row)
                b_q = load_tile(p_q, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)  # [ROWS, HEAD]
                b_do = load_tile(p_do, rows, m_row, g_row, VALUE_DIM, VALUE_PADDED)  # [ROWS, VALUE]
                # Bins of one key take two words, unless a row has no more than one.
                left = p_words + rows * (NUM_BINS // 32) + ((tile * TILE) >> bin_level >> 5)
                right = tl.minimum((tile * TILE + 32) >> bin_level >> 5, NUM_BINS // 32 - 1)
                right = p_words + rows * (NUM_BINS // 32) + right
                row = row_place + rows
                word, right_word, log_sum, delta = load_row_numbers(left, right, LOG_SUM + row, DELTA + row, m_row)
                factor = tl.full([ROWS], 1.0, tl.float32)
                if ROW_SCALE is not None:
                    factor = tl.load(ROW_SCALE + row, mask=m_row, other=0.0)
                # The next block comes one step early, so that no row waits for its number.
                element = tl.load(LISTED + start + tl.minimum(step + 1, count - 1))
                products = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [TILE, ROWS]
                if whole:
                    # One choice for 16 keys, which are what a warp has of the products.
                    o_part = tile * TILE + tl.arange(0, TILE // 16) * 16
                    keep = ((word[None, :] >> ((o_part >> bin_level) & 31)[:, None]) & 1) != 0  # [TILE / 16, ROWS]
                    offset = tl.where(keep, log_sum[None, :], float("inf"))
                    weights = tl.reshape(products, (TILE // 16, 16, ROWS)) * scale - offset[:, None, :]
                    weights = tl.reshape(tl.exp2(weights), (TILE, ROWS))
                else:
                    words = tl.where((o_tile < 32)[:, None], word[None, :], right_word[None, :])
                    keep = (words & (1 << ((o_key >> bin_level) & 31))[:, None]) != 0
                    keep &= rows_of_level(before + rows + 1 if CAUSAL else real, bin_level, NUM_BINS)[None, :]
                    if CAUSAL:
                        keep &= (o_key - before - first_row)[:, None] <= o_row[None, :]
                    weights = tl.exp2(tl.where(keep, products * scale - log_sum[None, :], float("-inf")))
                grad_k, grad_v = _add_rows(weights, b_q, b_do, b_v, factor, delta, grad_k, grad_v, PRECISION)

    if is_part:
        WIDTH: tl.constexpr = HEAD_DIM + VALUE_DIM
        SUMS += tl.program_id(0).to(tl.int64) * (TILE * WIDTH)
        store_rows(SUMS, o_tile, m_key, WIDTH, grad_k, HEAD_DIM, HEAD_PADDED)
        store_rows(SUMS + HEAD_DIM, o_tile, m_key, WIDTH, grad_v, VALUE_DIM, VALUE_PADDED)
    else:
        GRAD_K += item * gk_item + group * gk_head
        store_rows(GRAD_K, first + o_key, m_key, gk_row, grad_k * scaling, HEAD_DIM, HEAD_PADDED)
        GRAD_V += item * gv_item + group * gv_head
        store_rows(GRAD_V, first + o_key, m_key, gv_row, grad_v, VALUE_DIM, VALUE_PADDED)


@triton.jit
def _add_rows(weights, b_q, b_do, b_v, factor, delta, grad_k, grad_v, PRECISION: tl.constexpr):
    """Gradients of a tile's keys and values with those of some rows, from its weights [TILE, ROWS] in them."""
    grad_weights = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    grad_v += tl.dot((weights * factor[None, :]).to(b_do.dtype), b_do, input_precision=PRECISION)
    grad_scores = weights * (grad_weights * factor[None, :] - delta[None, :])
    grad_k += tl.dot(grad_scores.to(b_q.dtype), b_q, input_precision=PRECISION)
    return grad_k, grad_v
