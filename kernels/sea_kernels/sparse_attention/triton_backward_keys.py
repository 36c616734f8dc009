"""Gradients of sparse attention to the keys and values of runs, and of bins of the relative layout.

A program takes a tile of keys of one key head. For every query head that reads them it walks the rows that keep some of
them, 16 at a time, and adds up in registers. Which rows those are, ``triton_inverse.py`` lists; long lists, such as
those of the first tokens, are cut into parts (``triton_parts.py``). Bins of the relative layout have edges of their own
in every row: there a program walks all rows that may see its keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import cdiv, item_span, next_power_of_2, row_span
from ..triton_entries import Entries, EntryLists, relative_bin
from ..triton_inverse import UNIT_BITS, InverseLists, tile_range
from ..triton_parts import TileParts, add_parts, cut_tiles, part_of_program, store_rows
from .triton import LOG2E

TILE_KEYS = 16


def differentiate_keys(
    query: Tensor,
    grad_output: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    row_scale: Tensor | None,
    key: Tensor,
    value: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    lists: EntryLists,
    entries: list[Entries],
    scaling: float,
) -> None:
    """Fill ``grad_key`` and ``grad_value`` at real keys.

    Args:
        query: ``[N, H, T, D]``; its last dimension is contiguous, as those of grad_output, key and value are.
        grad_output: ``[N, H, T, E]``.
        log_sum: float32 ``[N, H, T]``, log2 of the sum of each row's exponentiated scores.
        delta: float32 ``[N, H, T]``, product of grad_output and output; strides as of log_sum.
        row_scale: float32 ``[N, H, T]``, factor of the output, or None; strides as of log_sum.
        key: ``[N, G, S, D]``.
        value: ``[N, G, S, E]``.
        grad_key: like key.
        grad_value: like value.
        lists: of the mask.
        entries: all of its entries; unused for bins of the relative layout.
        scaling: factor of the scores.
    """
    batch, heads, num_queries, head_dim = query.shape
    groups, num_keys, value_dim = value.shape[1:]
    tiles = cdiv(num_keys, TILE_KEYS)
    tensors = query, key, value, grad_output, grad_key, grad_value
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    args = [*tensors, log_sum, delta, row_scale, lists.spans, *strides, *log_sum.stride()[:2]]
    args += [groups, heads // groups, num_queries, num_keys, tiles, scaling * LOG2E, scaling]
    options = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "HEAD_PADDED": max(16, next_power_of_2(head_dim)),
        "VALUE_PADDED": max(16, next_power_of_2(value_dim)),
        "KEYS": TILE_KEYS,
        "UNIT_BITS": UNIT_BITS,
        "CAUSAL": lists.causal,
        "HAS_PADDING": lists.spans is not None,
        "HAS_SCALE": row_scale is not None,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }
    options |= _launch_config(max(head_dim, value_dim) * query.dtype.itemsize)
    if lists.relative:
        _key_kernel[batch * groups * tiles,](*args, **_relative_source(lists), **options)
        return
    inverse = InverseLists(lists, entries)
    parts = cut_tiles(inverse, num_keys, TILE_KEYS, batch * heads, heads // groups)
    sums = log_sum.new_empty(len(parts.tile), TILE_KEYS, head_dim + value_dim)
    _key_kernel[parts.programs(),](*args, **_listed_source(inverse, parts), SUMS=sums, **options)
    add_parts(parts, sums, grad_key, grad_value, lists.spans, scaling)


def _relative_source(lists: EntryLists) -> dict:
    """Where the kernel finds a tile's rows in the relative layout: they are those that see it."""
    mask = lists.mask
    unused = dict.fromkeys(("LISTED", "OFFSETS", "PART_SIZE", "PART_ENDS", "PART_TILE", "SUMS"))
    unused |= {"bound": 0, "all_tiles": 0, "level": 0, "units": 0}
    found = {"BITS": lists.source, "shift": mask.shift, "NUM_BINS": mask.num_bins, "HAS_SHIFT": mask.shift != 0}
    return unused | found | {"RELATIVE": True}


def _listed_source(inverse: InverseLists, parts: TileParts) -> dict:
    """Where the kernel finds those of runs."""
    found = {"LISTED": inverse.rows, "OFFSETS": inverse.offsets}
    found |= {"level": inverse.first_level, "units": inverse.units}
    found |= dict(zip(("PART_TILE", "PART_ENDS", "PART_SIZE", "bound", "all_tiles"), parts.args(), strict=True))
    return found | {"BITS": None, "shift": 0, "NUM_BINS": 32, "HAS_SHIFT": False, "RELATIVE": False}


def _launch_config(row_bytes: int) -> dict:
    """Launch parameters for the wider of query and value: the sums of a tile must fit into registers."""
    warps = 1 if row_bytes <= 128 else 2 if row_bytes <= 256 else 4
    # Rows are gathered through a list: it takes five stages to have two of them under way.
    return {"ROWS": 16, "num_warps": warps, "num_stages": 5 if row_bytes <= 256 else 3}


@triton.jit
def _seeing_rows(first_key, num_queries, num_keys, first, real, CAUSAL: tl.constexpr):
    """Begin and end of the rows that may see keys from ``first_key`` on."""
    offset = first - (num_keys - num_queries)  # row of the first real key
    start = tl.maximum(first_key + offset if CAUSAL else offset, 0)
    return start, tl.where(first_key < real, tl.minimum(real + offset, num_queries), start)


@triton.jit
def _add_rows(
    p_q,
    p_grad,
    LOG_SUM,
    DELTA,
    ROW_SCALE,
    rows,
    m_rows,
    keep,
    b_k,
    b_v,
    grad_k,
    grad_v,
    q_row,
    g_row,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what ``rows [ROWS]`` of a head give to the gradients of a tile; keep: [KEYS, ROWS]."""
    o_dim, o_value = tl.arange(0, HEAD_PADDED)[None, :], tl.arange(0, VALUE_PADDED)[None, :]
    long_rows, m_row = rows.to(tl.int64)[:, None], m_rows[:, None]
    b_q = tl.load(p_q + long_rows * q_row + o_dim, mask=m_row & (o_dim < HEAD_DIM), other=0.0)  # [ROWS, HEAD]
    b_grad = tl.load(p_grad + long_rows * g_row + o_value, mask=m_row & (o_value < VALUE_DIM), other=0.0)
    log_sum = tl.load(LOG_SUM + rows, mask=m_rows, other=0.0)
    delta = tl.load(DELTA + rows, mask=m_rows, other=0.0)
    scores = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale  # [KEYS, ROWS]
    weights = tl.where(keep, tl.exp2(scores - log_sum[None, :]), 0.0)
    products = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)
    shares = weights
    if HAS_SCALE:
        factor = tl.load(ROW_SCALE + rows, mask=m_rows, other=0.0)[None, :]
        products *= factor
        shares *= factor
    grad_v += tl.dot(shares.to(b_grad.dtype), b_grad, input_precision=PRECISION)
    grad_scores = weights * (products - delta[None, :])
    grad_k += tl.dot(grad_scores.to(b_q.dtype), b_q, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(
    do_not_specialize=[
        "r_item",
        "r_head",
        "num_queries",
        "num_keys",
        "tiles",
        "scale",
        "scaling",
        "bound",
        "all_tiles",
        "level",
        "units",
        "shift",
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
    SPANS,
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
    scale,
    scaling,
    LISTED,
    OFFSETS,
    PART_TILE,
    PART_ENDS,
    PART_SIZE,
    bound,
    all_tiles,
    SUMS,
    level,
    units,
    BITS,
    shift,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    UNIT_BITS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile that is not long, or SUMS of a part."""
    if RELATIVE:
        is_part: tl.constexpr = False
        place = tl.program_id(0)
    else:
        place, low, high, is_part = part_of_program(PART_TILE, PART_ENDS, PART_SIZE, bound, all_tiles)
        if place < 0:
            return
    item_group, tile = (place // tiles).to(tl.int64), place % tiles
    item, group = item_group // groups, item_group % groups
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    o_key = tile * KEYS + tl.arange(0, KEYS)
    m_key = (o_key < real)[:, None]
    o_dim, o_value = tl.arange(0, HEAD_PADDED)[None, :], tl.arange(0, VALUE_PADDED)[None, :]
    m_k, m_v = m_key & (o_dim < HEAD_DIM), m_key & (o_value < VALUE_DIM)
    key_row = (first + o_key).to(tl.int64)[:, None]
    b_k = tl.load(K + item * k_item + group * k_head + key_row * k_row + o_dim, mask=m_k, other=0.0)  # [KEYS, HEAD]
    b_v = tl.load(V + item * v_item + group * v_head + key_row * v_row + o_value, mask=m_v, other=0.0)
    grad_k = tl.zeros([KEYS, HEAD_PADDED], tl.float32)
    grad_v = tl.zeros([KEYS, VALUE_PADDED], tl.float32)
    seen = item_group * 0  # rows in the lists so far
    for member in range(0, members):
        head = group * members + member
        item_head = item_group * members + member
        if RELATIVE:
            start, stop = _seeing_rows(tile * KEYS, num_queries, num_keys, first, real, CAUSAL)
        else:
            begin, end = tile_range(OFFSETS, item_head, level, tile * KEYS, level, 1, units, KEYS)
            start = begin + tl.maximum(low - seen, 0)
            stop = tl.minimum(end, begin + (high - seen))
            seen += end - begin
        steps = ((tl.maximum(stop - start, 0) + ROWS - 1) // ROWS).to(tl.int32)
        row_place = item * r_item + head * r_head
        for step in range(0, steps):
            o_list = start + step * ROWS + tl.arange(0, ROWS)
            m_list = o_list < stop
            rows = o_list
            if RELATIVE == 0:
                element = tl.load(LISTED + o_list, mask=m_list, other=0)
                rows = element >> UNIT_BITS
            _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
            keep = m_list[None, :] & (o_key[:, None] < length[None, :])  # [KEYS, ROWS]
            if RELATIVE:
                index = relative_bin(o_key[:, None], length[None, :], shift, NUM_BINS, HAS_SHIFT)
                p_word = BITS + (item_head * num_queries + rows)[None, :] * (NUM_BINS // 32) + (index >> 5)
                keep = keep & (((tl.load(p_word, mask=keep, other=0) >> (index & 31)) & 1) != 0)
            else:  # the unit that the row keeps is the key's
                keep = keep & ((((o_key >> level)[:, None] ^ element[None, :]) & ((1 << UNIT_BITS) - 1)) == 0)
            grad_k, grad_v = _add_rows(
                Q + item * q_item + head * q_head,
                GRAD_OUT + item * g_item + head * g_head,
                LOG_SUM + row_place,
                DELTA + row_place,
                ROW_SCALE + row_place if HAS_SCALE else ROW_SCALE,
                rows,
                m_list,
                keep,
                b_k,
                b_v,
                grad_k,
                grad_v,
                q_row,
                g_row,
                scale,
                HEAD_DIM,
                VALUE_DIM,
                HEAD_PADDED,
                VALUE_PADDED,
                HAS_SCALE,
                PRECISION,
            )
    m_key = o_key < real
    if is_part:
        WIDTH: tl.constexpr = HEAD_DIM + VALUE_DIM
        SUMS += tl.program_id(0).to(tl.int64) * (KEYS * WIDTH)
        store_rows(SUMS, tl.arange(0, KEYS), m_key, WIDTH, grad_k, HEAD_DIM, HEAD_PADDED)
        store_rows(SUMS + HEAD_DIM, tl.arange(0, KEYS), m_key, WIDTH, grad_v, VALUE_DIM, VALUE_PADDED)
    else:
        GRAD_K += item * gk_item + group * gk_head
        store_rows(GRAD_K, first + o_key, m_key, gk_row, grad_k * scaling, HEAD_DIM, HEAD_PADDED)
        GRAD_V += item * gv_item + group * gv_head
        store_rows(GRAD_V, first + o_key, m_key, gv_row, grad_v, VALUE_DIM, VALUE_PADDED)
