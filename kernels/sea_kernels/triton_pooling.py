"""Pooled keys for the Triton kernels: two vectors per bin or run of keys, from which one product gives its score.

With center = (max + min) / 2 and half = (max - min) / 2, the score ``a q.mean + c sum_d max(q_d min_d, q_d max_d)`` is
``q.(a mean + c center) + |q|.(c half)``. So every query head gets the vectors *near* = a mean + c center and *far* =
c half, or near alone where c is 0.
"""

import triton
import triton.language as tl
from torch import Tensor

from .triton_common import cdiv, item_span, next_power_of_2

TILE_KEYS = 64  # keys that one program pools at a time


def pool_bins(
    key: Tensor,
    heads: int,
    num_bins: int,
    levels: int,
    spans: Tensor | None,
    scaling: float,
    mean_weight: Tensor | None,
    bound_weight: Tensor | None,
) -> Tensor:
    """Near and far vectors of the aligned bins of every width 2^l: ``[N, H, levels, K, 1 or 2, D]`` in key's dtype.

    Without weights mean, center and half, which serve all weights: ``[N, H, levels, K, 3, D]``.
    """
    batch, groups, num_keys, head_dim = key.shape
    parts = 3 if mean_weight is None else 1 if bound_weight is None else 2
    pooled = key.new_empty(batch, heads, levels, num_bins, parts, head_dim)
    _pool_bins_kernel[(levels * num_bins, groups, batch)](
        key,
        pooled,
        spans,
        mean_weight,
        bound_weight,
        *key.stride()[:3],
        num_keys,
        levels,
        heads // groups,
        scaling,
        HEAD_DIM=head_dim,
        HEAD_PADDED=next_power_of_2(head_dim),
        PARTS=parts,
        NUM_BINS=num_bins,
        HAS_PADDING=spans is not None,
        num_warps=1,
    )
    return pooled


def pool_runs(
    key: Tensor,
    heads: int,
    width: int,
    spans: Tensor | None,
    scaling: float,
    mean_weight: Tensor,
    bound_weight: Tensor | None,
) -> Tensor:
    """Near and far vectors of all runs of ``width`` keys: ``[N, H, S / width, 1 or 2, D]`` in key's dtype."""
    batch, groups, num_keys, head_dim = key.shape
    parts = 1 if bound_weight is None else 2
    num_runs = cdiv(num_keys, width)
    pooled = key.new_empty(batch, heads, num_runs, parts, head_dim)
    runs = max(1, TILE_KEYS // width)
    _pool_runs_kernel[(cdiv(num_runs, runs), groups, batch)](
        key,
        pooled,
        spans,
        mean_weight,
        bound_weight,
        *key.stride()[:3],
        num_keys,
        num_runs,
        heads // groups,
        scaling,
        HEAD_DIM=head_dim,
        HEAD_PADDED=next_power_of_2(head_dim),
        PARTS=parts,
        RUNS=runs,
        WIDTH=width,
        HAS_PADDING=spans is not None,
        num_warps=4,
    )
    return pooled


@triton.jit
def _store_pooled(
    p_out,
    mean,
    highest,
    lowest,
    head,
    scaling,
    MEAN_WEIGHT,
    BOUND_WEIGHT,
    mask,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Combine what was pooled with the weights of one query head, or store it as it is."""
    if PARTS == 3:
        near = mean * scaling
        center = 0.5 * scaling * (highest + lowest)
        half = 0.5 * tl.abs(scaling) * (highest - lowest)
        tl.store(p_out + HEAD_DIM, center.to(p_out.dtype.element_ty), mask=mask)
        tl.store(p_out + 2 * HEAD_DIM, half.to(p_out.dtype.element_ty), mask=mask)
    else:
        near = mean * (tl.load(MEAN_WEIGHT + head).to(tl.float32) * scaling)
    if PARTS == 2:
        half_bound = 0.5 * tl.load(BOUND_WEIGHT + head).to(tl.float32)
        near += half_bound * scaling * (highest + lowest)
        far = half_bound * tl.abs(scaling) * (highest - lowest)
        tl.store(p_out + HEAD_DIM, far.to(p_out.dtype.element_ty), mask=mask)
    tl.store(p_out, near.to(p_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_keys", "levels", "heads_per_group", "scaling"])
def _pool_bins_kernel(
    K,
    POOLED,
    SPANS,
    MEAN_WEIGHT,
    BOUND_WEIGHT,
    k_item,
    k_head,
    k_row,
    num_keys,
    levels,
    heads_per_group,
    scaling,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    level, index = tl.program_id(0) // NUM_BINS, tl.program_id(0) % NUM_BINS
    group, item = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    begin = index << level
    end = tl.minimum(begin + (1 << level), real)
    o_dim, o_tile = tl.arange(0, HEAD_PADDED), tl.arange(0, 16)
    m_dim = o_dim < HEAD_DIM
    K += item * k_item + group.to(tl.int64) * k_head
    total = tl.zeros([HEAD_PADDED], tl.float32)
    highest = tl.full([HEAD_PADDED], float("-inf"), tl.float32)
    lowest = tl.full([HEAD_PADDED], float("inf"), tl.float32)
    for offset in range(begin, end, 16):
        o_key = offset + o_tile
        m_key = (o_key < end)[:, None] & m_dim[None, :]
        keys = tl.load(K + (first + o_key).to(tl.int64)[:, None] * k_row + o_dim[None, :], mask=m_key, other=0.0)
        keys = keys.to(tl.float32)
        total += tl.sum(keys, 0)
        if PARTS > 1:
            real_key = (o_key < end)[:, None]
            highest = tl.maximum(highest, tl.max(tl.where(real_key, keys, float("-inf")), 0))
            lowest = tl.minimum(lowest, tl.min(tl.where(real_key, keys, float("inf")), 0))
    filled = end > begin  # a bin without keys is never a candidate; zeros keep the products finite
    highest, lowest = tl.where(filled, highest, 0.0), tl.where(filled, lowest, 0.0)
    mean = total / tl.maximum(end - begin, 1).to(tl.float32)
    for member in range(0, heads_per_group):
        head = group * heads_per_group + member
        place = ((item * tl.num_programs(1) * heads_per_group + head) * levels + level) * NUM_BINS + index
        p_out = POOLED + place * PARTS * HEAD_DIM + o_dim
        _store_pooled(p_out, mean, highest, lowest, head, scaling, MEAN_WEIGHT, BOUND_WEIGHT, m_dim, HEAD_DIM, PARTS)


@triton.jit(do_not_specialize=["num_keys", "num_runs", "heads_per_group", "scaling"])
def _pool_runs_kernel(
    K,
    POOLED,
    SPANS,
    MEAN_WEIGHT,
    BOUND_WEIGHT,
    k_item,
    k_head,
    k_row,
    num_keys,
    num_runs,
    heads_per_group,
    scaling,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    RUNS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    group, item = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    o_run, o_dim = tl.program_id(0) * RUNS + tl.arange(0, RUNS), tl.arange(0, HEAD_PADDED)
    o_key = o_run[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [RUNS, WIDTH]
    real_key = (o_key < real)[:, :, None]
    m_key = real_key & (o_dim < HEAD_DIM)[None, None, :]
    K += item * k_item + group.to(tl.int64) * k_head
    keys = tl.load(K + (first + o_key).to(tl.int64)[:, :, None] * k_row + o_dim[None, None, :], mask=m_key, other=0.0)
    keys = keys.to(tl.float32)
    count = tl.minimum(tl.maximum(real - o_run * WIDTH, 0), WIDTH)
    mean = tl.sum(keys, 1) / tl.maximum(count, 1).to(tl.float32)[:, None]
    filled = (count > 0)[:, None]
    highest = tl.where(filled, tl.max(tl.where(real_key, keys, float("-inf")), 1), 0.0)
    lowest = tl.where(filled, tl.min(tl.where(real_key, keys, float("inf")), 1), 0.0)
    m_out = (o_run < num_runs)[:, None] & (o_dim < HEAD_DIM)[None, :]
    for member in range(0, heads_per_group):
        head = group * heads_per_group + member
        place = (item * tl.num_programs(1) * heads_per_group + head) * num_runs + o_run
        p_out = POOLED + place[:, None] * PARTS * HEAD_DIM + o_dim[None, :]
        _store_pooled(p_out, mean, highest, lowest, head, scaling, MEAN_WEIGHT, BOUND_WEIGHT, m_out, HEAD_DIM, PARTS)
