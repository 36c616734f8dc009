"""Relative bins for the Triton forms of the pooled-key scores (forward).

Bidirectional rows of an item share them: they are pooled once. Causal ones have other edges in every row: a program per
row reads each bin from a table of prefix sums or of maxima, and no pooled keys of all rows exist.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..bins import SHIFT_UNIT
from ..pooling import RunPool
from ..triton_common import cdiv, item_span, next_power_of_2, row_span
from ..triton_entries import relative_start

TILE_KEYS = 32


def pool_relative_bins(
    key: Tensor, num_bins: int, scaling: float, statistic: str, spans: Tensor | None, shift: int
) -> Tensor:
    """Vectors of an item's relative bins as ``pool_bins`` has them, of one level: ``[N, G, 1, K, 1 or 2, D]``."""
    batch, groups, num_keys, head_dim = key.shape
    parts = 1 if statistic == "mean" else 2
    pooled = key.new_empty(batch, groups, 1, num_bins, parts, head_dim)
    _pool_relative_kernel[(num_bins, groups, batch)](
        key,
        pooled,
        spans,
        *key.stride()[:3],
        num_keys,
        shift,
        scaling,
        HEAD_DIM=head_dim,
        HEAD_PADDED=next_power_of_2(head_dim),
        PARTS=parts,
        NUM_BINS=num_bins,
        HAS_PADDING=spans is not None,
        TILE=TILE_KEYS,
        num_warps=1,
    )
    return pooled


def score_own_edges(
    query: Tensor, key: Tensor, num_bins: int, scaling: float, statistic: str, spans: Tensor | None, shift: int
) -> Tensor:
    """Scores of the relative bins of causal rows, ``[N, H, T, K]``."""
    batch, heads, num_queries, head_dim = query.shape
    groups, num_keys = key.shape[1:3]
    longest = 2 * cdiv(num_keys, num_bins) + cdiv(abs(shift), SHIFT_UNIT)
    table = RunPool(key, statistic, longest).table
    scores = query.new_empty(batch, heads, num_queries, num_bins)
    _own_edges_kernel[(num_queries, groups, batch)](
        query,
        table,
        scores,
        spans,
        *query.stride()[:3],
        num_queries,
        num_keys,
        1 if statistic == "mean" else table.shape[2],
        heads // groups,
        shift,
        scaling,
        HEAD_DIM=head_dim,
        HEAD_PADDED=next_power_of_2(head_dim),
        NUM_BINS=num_bins,
        BINS=32,
        IS_MEAN=statistic == "mean",
        HAS_PADDING=spans is not None,
        num_warps=4,
    )
    return scores


@triton.jit(do_not_specialize=["num_keys", "shift", "scaling"])
def _pool_relative_kernel(
    K,
    POOLED,
    SPANS,
    k_item,
    k_head,
    k_row,
    num_keys,
    shift,
    scaling,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    TILE: tl.constexpr,
):
    index, group, item = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    start, end = _pooled_run(index, real, shift, NUM_BINS)
    o_dim, o_tile = tl.arange(0, HEAD_PADDED), tl.arange(0, TILE)
    m_dim = o_dim < HEAD_DIM
    p_k = K + item * k_item + group.to(tl.int64) * k_head + first.to(tl.int64) * k_row + o_dim[None, :]
    total = tl.zeros([HEAD_PADDED], tl.float32)
    highest = tl.full([HEAD_PADDED], float("-inf"), tl.float32)
    lowest = tl.full([HEAD_PADDED], float("inf"), tl.float32)
    for tile in range(start, end, TILE):
        o_key = tile + o_tile
        m_key = ((o_key < end) & (o_key < real))[:, None]
        keys = tl.load(p_k + o_key[:, None] * k_row, mask=m_key & m_dim[None, :], other=0.0).to(tl.float32)
        if PARTS == 1:
            total += tl.sum(keys, 0)
        else:
            highest = tl.maximum(highest, tl.max(tl.where(m_key, keys, float("-inf")), 0))
            lowest = tl.minimum(lowest, tl.min(tl.where(m_key, keys, float("inf")), 0))
    p_out = POOLED + ((item * tl.num_programs(1) + group) * NUM_BINS + index) * (PARTS * HEAD_DIM) + o_dim
    if PARTS == 1:
        near = total * (scaling / (end - start).to(tl.float32))
    else:
        near = 0.5 * scaling * (highest + lowest)
        far = 0.5 * tl.abs(scaling) * (highest - lowest)
        tl.store(p_out + HEAD_DIM, far.to(POOLED.dtype.element_ty), mask=m_dim)
    tl.store(p_out, near.to(POOLED.dtype.element_ty), mask=m_dim)


@triton.jit
def _pooled_run(index, length, shift, NUM_BINS: tl.constexpr):
    """Start and end of the keys that stand for a relative bin, int64: its own, or the nearest to its middle."""
    start = relative_start(index, length, shift, NUM_BINS, True)
    end = relative_start(index + 1, length, shift, NUM_BINS, True)
    length = length.to(tl.int64)
    middle = (256 * (2 * index + 1) * length + 2 * NUM_BINS * shift) // (512 * NUM_BINS)
    nearest = tl.minimum(tl.maximum(middle, 0), tl.maximum(length - 1, 0))
    empty = start == end
    return tl.where(empty, nearest, start), tl.where(empty, nearest + 1, end)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "heads_per_group", "shift", "scaling"])
def _own_edges_kernel(
    Q,
    TABLE,
    SCORES,
    SPANS,
    q_item,
    q_head,
    q_row,
    num_queries,
    num_keys,
    num_levels,
    heads_per_group,
    shift,
    scaling,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BINS: tl.constexpr,
    IS_MEAN: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    """One row against its own bins, for all query heads of a key head."""
    row, group, item = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(1)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    _, length = row_span(row, num_queries, num_keys, first, real, True)
    o_dim = tl.arange(0, HEAD_PADDED)
    m_dim = o_dim < HEAD_DIM
    for first_bin in range(0, NUM_BINS, BINS):
        o_bin = first_bin + tl.arange(0, BINS)
        start, end = _pooled_run(o_bin, length, shift, NUM_BINS)
        mask = (length > 0) & m_dim[None, :]
        if IS_MEAN:
            p_sum = TABLE + (item * groups + group) * (num_keys + 1) * HEAD_DIM + o_dim[None, :]
            total = tl.load(p_sum + (first + end)[:, None] * HEAD_DIM, mask=mask, other=0.0)
            total -= tl.load(p_sum + (first + start)[:, None] * HEAD_DIM, mask=mask, other=0.0)
            upper = (total / (end - start)[:, None].to(tl.float64)).to(tl.float32)  # [BINS, HEAD]
        else:
            level = start * 0
            for exponent in range(1, num_levels):
                level += (end - start >= (1 << exponent)).to(tl.int64)
            p_max = TABLE + (item * groups + group) * num_levels * num_keys * (2 * HEAD_DIM) + o_dim[None, :]
            p_one = p_max + (level * num_keys + first + start)[:, None] * (2 * HEAD_DIM)
            p_two = p_max + (level * num_keys + first + end - (1 << level))[:, None] * (2 * HEAD_DIM)
            upper = tl.maximum(tl.load(p_one, mask=mask, other=0.0), tl.load(p_two, mask=mask, other=0.0))
            lower = tl.maximum(
                tl.load(p_one + HEAD_DIM, mask=mask, other=0.0), tl.load(p_two + HEAD_DIM, mask=mask, other=0.0)
            )
        for member in range(0, heads_per_group):
            head = group * heads_per_group + member
            p_q = Q + item * q_item + head.to(tl.int64) * q_head + row.to(tl.int64) * q_row + o_dim
            b_q = tl.load(p_q, mask=m_dim & (length > 0), other=0.0).to(tl.float32)[None, :] * scaling
            if IS_MEAN:
                scores = tl.sum(b_q * upper, 1)
            else:
                scores = tl.sum(tl.maximum(b_q, 0.0) * upper + tl.maximum(-b_q, 0.0) * lower, 1)
            p_score = SCORES + ((item * groups * heads_per_group + head) * num_queries + row) * NUM_BINS + o_bin
            tl.store(p_score, scores.to(SCORES.dtype.element_ty))
