"""Pooling of the far field: all aligned bins, or all runs of one width, around each query head's centre."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import cdiv, item_span, next_power_of_2

POOL_KEYS = 64  # keys that one program pools at a time


class Pool(NamedTuple):
    """Pooled bins or runs of every query head.

    Attributes:
        key: ``[N, H, C, D]``, k~.
        value: ``[N, H, C, E]``, v~.
        offset: float32 ``[N, H, C]``, ``log sum_j exp(u . k_j) - u . k~``, which is added to ``scaling * q . k~``.
    """

    key: Tensor
    value: Tensor
    offset: Tensor


def pool(
    key: Tensor, value: Tensor, centre: Tensor, spans: Tensor | None, count: int, num_bins: int, level: int
) -> Pool:
    """``count`` pooled places of every query head.

    With ``num_bins``, place ``l * num_bins + b`` is bin b of 2^l keys; else all places are runs of ``2^level`` keys.
    """
    batch, groups, num_keys, head_dim = key.shape
    heads, value_dim = centre.shape[0], value.shape[-1]
    keys = key.new_empty(batch, heads, count, head_dim)
    values = value.new_empty(batch, heads, count, value_dim)
    offsets = torch.empty(batch, heads, count, dtype=torch.float32, device=key.device)
    runs = 1 if num_bins else max(1, POOL_KEYS >> level)
    warps = 4 if max(head_dim, value_dim) <= 64 else 8
    _pool_kernel[(cdiv(count, runs), heads, batch)](
        key,
        value,
        centre.contiguous(),
        keys,
        values,
        offsets,
        spans,
        *key.stride()[:3],
        *value.stride()[:3],
        num_keys,
        count,
        heads // groups,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        HEAD_PADDED=next_power_of_2(head_dim),
        VALUE_PADDED=next_power_of_2(value_dim),
        NUM_BINS=num_bins,
        LEVEL=level,
        RUNS=runs,
        TILE_KEYS=16 if num_bins else min(16, 1 << level),
        HAS_PADDING=spans is not None,
        num_warps=1 if num_bins else warps,
    )
    return Pool(keys, values, offsets)


@triton.jit(do_not_specialize=["num_keys", "count", "heads_per_group"])
def _pool_kernel(
    K,
    V,
    CENTRE,
    POOLED_K,
    POOLED_V,
    OFFSET,
    SPANS,
    k_item,
    k_head,
    k_row,
    v_item,
    v_head,
    v_row,
    num_keys,
    count,
    heads_per_group,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    LEVEL: tl.constexpr,
    RUNS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    head, item = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    place = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    level, index = LEVEL, place
    if NUM_BINS > 0:
        level, index = tl.program_id(0) // NUM_BINS, place % NUM_BINS
    begin = index << level  # [RUNS]
    end = tl.minimum(begin + (1 << level), real)
    o_dim, o_value, o_tile = tl.arange(0, HEAD_PADDED), tl.arange(0, VALUE_PADDED), tl.arange(0, TILE_KEYS)
    m_dim, m_value = (o_dim < HEAD_DIM)[None, None, :], (o_value < VALUE_DIM)[None, None, :]
    group = (head // heads_per_group).to(tl.int64)
    K += item * k_item + group * k_head
    V += item * v_item + group * v_head
    centre = tl.load(CENTRE + head * HEAD_DIM + o_dim, mask=o_dim < HEAD_DIM, other=0.0).to(tl.float32)
    highest = tl.full([RUNS], -1e30, tl.float32)
    total = tl.zeros([RUNS], tl.float32)
    sum_k = tl.zeros([RUNS, HEAD_PADDED], tl.float32)
    sum_v = tl.zeros([RUNS, VALUE_PADDED], tl.float32)
    for offset in range(0, tl.minimum(1 << level, tl.max(tl.maximum(end - begin, 0))), TILE_KEYS):
        o_key = begin[:, None] + offset + o_tile[None, :]  # [RUNS, TILE_KEYS]
        m_key = o_key < end[:, None]
        row = (first + o_key).to(tl.int64)[:, :, None]
        keys = tl.load(K + row * k_row + o_dim[None, None, :], mask=m_key[:, :, None] & m_dim, other=0.0)
        values = tl.load(V + row * v_row + o_value[None, None, :], mask=m_key[:, :, None] & m_value, other=0.0)
        keys, values = keys.to(tl.float32), values.to(tl.float32)
        logits = tl.where(m_key, tl.sum(keys * centre[None, None, :], 2), float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp(logits - new_highest[:, None])
        rescale = tl.exp(highest - new_highest)
        total = total * rescale + tl.sum(weights, 1)
        sum_k = sum_k * rescale[:, None] + tl.sum(weights[:, :, None] * keys, 1)
        sum_v = sum_v * rescale[:, None] + tl.sum(weights[:, :, None] * values, 1)
        highest = new_highest
    some = tl.where(total > 0, total, 1.0)  # places without keys are never read
    pooled = (sum_k / some[:, None]).to(POOLED_K.dtype.element_ty)
    offset = highest + tl.log(some) - tl.sum(pooled.to(tl.float32) * centre[None, :], 1)
    m_place = place < count
    place += (item * tl.num_programs(1) + head) * count
    tl.store(
        POOLED_K + place[:, None] * HEAD_DIM + o_dim[None, :],
        pooled,
        mask=m_place[:, None] & (o_dim < HEAD_DIM)[None, :],
    )
    mean = (sum_v / some[:, None]).to(POOLED_V.dtype.element_ty)
    tl.store(
        POOLED_V + place[:, None] * VALUE_DIM + o_value[None, :],
        mean,
        mask=m_place[:, None] & (o_value < VALUE_DIM)[None, :],
    )
    tl.store(OFFSET + place, offset, mask=m_place)
