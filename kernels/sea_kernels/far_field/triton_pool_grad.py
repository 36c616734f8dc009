"""Backward pass of the pooling: from pooled keys, values and offsets to keys, values and the centre.

With a_j the softmax of u . k_j over a run's keys, g and h the gradients to k~ and v~ and o that to the offset,
``log sum_j exp(u . k_j) - u . k~``::

    dx_j = a_j ((g - o u) . (k_j - k~) + h . (v_j - v~) + o)        gradient to u . k_j
    dk_j = a_j (g - o u) + dx_j u,   dv_j = a_j h,   du = sum_j (dx_j k_j - a_j o k~)

A key lies in one run of a second look and in one bin of every width, so a program that takes a tile of keys needs no
other program's sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import aligned_level, cdiv, item_span, next_power_of_2
from .triton_pool import Pool
from .triton_walk import Walk, load_columns

TILE_KEYS = 32  # of which a tile lies within the K bins of a width, or outside of them


def pool_gradients(
    walk: Walk, pools: list[Pool], grads: list[Pool], kept_key: Tensor, kept_value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to key, value and centre, in their dtypes.

    Args:
        walk: sizes of the call.
        pools: the pooled bins, and the pooled runs of a second look.
        grads: their gradients.
        kept_key: float32 ``[N, G, S, D]`` from ``kept_gradients``, to which the gradient through pooling is added.
        kept_value: float32 ``[N, G, S, E]``.
    """
    key, value, centre = walk.key, walk.value, walk.centre
    new = torch.empty if walk.spans is None else torch.zeros  # no program visits padding
    grad_key, grad_value = (new(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
    tiles = cdiv(walk.num_keys, TILE_KEYS)
    grad_centre = torch.empty(walk.batch, tiles, *centre.shape, dtype=torch.float32, device=key.device)
    _pool_gradients_kernel[(tiles, walk.batch * walk.groups)](
        key,
        value,
        centre,
        kept_key,
        kept_value,
        grad_key,
        grad_value,
        grad_centre,
        *pools[0],
        *grads[0],
        *pools[-1],
        *grads[-1],
        walk.spans,
        *key.stride()[:3],
        *value.stride()[:3],
        walk.heads,
        walk.heads // walk.groups,
        walk.num_keys,
        walk.levels,
        walk.num_runs,
        HEAD_DIM=walk.head_dim,
        VALUE_DIM=walk.value_dim,
        HEAD_PADDED=next_power_of_2(walk.head_dim),
        VALUE_PADDED=next_power_of_2(walk.value_dim),
        NUM_BINS=walk.bins.num_bins,
        WIDTH=walk.width,
        LOOKS_TWICE=walk.looks_twice,
        HAS_PADDING=walk.spans is not None,
        TILE=TILE_KEYS,
        num_warps=4 if max(walk.head_dim, walk.value_dim) <= 64 else 8,
    )
    return grad_key, grad_value, grad_centre.sum((0, 1)).to(centre.dtype)


@triton.jit
def _add_pooled(
    POOLED_K,
    POOLED_V,
    OFFSET,
    GRAD_POOLED_K,
    GRAD_POOLED_V,
    GRAD_OFFSET,
    place,
    m_key,
    b_k,
    b_v,
    centre,
    grad_k,
    grad_v,
    grad_centre,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
):
    """Add what flows from the run at ``place [TILE]`` of every key."""
    pooled_k = load_columns(POOLED_K, place, m_key, HEAD_DIM, HEAD_DIM, HEAD_PADDED).to(tl.float32)
    pooled_v = load_columns(POOLED_V, place, m_key, VALUE_DIM, VALUE_DIM, VALUE_PADDED).to(tl.float32)
    offset = tl.load(OFFSET + place, mask=m_key, other=0.0)
    b_g = load_columns(GRAD_POOLED_K, place, m_key, HEAD_DIM, HEAD_DIM, HEAD_PADDED)
    b_h = load_columns(GRAD_POOLED_V, place, m_key, VALUE_DIM, VALUE_DIM, VALUE_PADDED)
    b_o = tl.load(GRAD_OFFSET + place, mask=m_key, other=0.0)
    b_g -= b_o[:, None] * centre[None, :]
    share = tl.exp(tl.sum((b_k - pooled_k) * centre[None, :], 1) - offset)  # of a key in its run's mass
    share = tl.where(m_key, share, 0.0)
    grad_logit = share * (tl.sum(b_g * (b_k - pooled_k), 1) + tl.sum(b_h * (b_v - pooled_v), 1) + b_o)
    grad_k += share[:, None] * b_g + grad_logit[:, None] * centre[None, :]
    grad_v += share[:, None] * b_h
    grad_centre += tl.sum(grad_logit[:, None] * b_k - (share * b_o)[:, None] * pooled_k, 0)
    return grad_k, grad_v, grad_centre


@triton.jit(do_not_specialize=["heads", "heads_per_group", "num_keys", "num_levels", "num_runs"])
def _pool_gradients_kernel(
    K,
    V,
    CENTRE,
    KEPT_K,
    KEPT_V,
    GRAD_K,
    GRAD_V,
    GRAD_CENTRE,
    BIN_K,
    BIN_V,
    BIN_OFFSET,
    GRAD_BIN_K,
    GRAD_BIN_V,
    GRAD_BIN_OFFSET,
    RUN_K,
    RUN_V,
    RUN_OFFSET,
    GRAD_RUN_K,
    GRAD_RUN_V,
    GRAD_RUN_OFFSET,
    SPANS,
    k_item,
    k_head,
    k_row,
    v_item,
    v_head,
    v_row,
    heads,
    heads_per_group,
    num_keys,
    num_levels,
    num_runs,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOOKS_TWICE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    TILE: tl.constexpr,
):
    groups = heads // heads_per_group
    item_group = tl.program_id(1).to(tl.int64)
    item, group = item_group // groups, item_group % groups
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    begin_key = tl.program_id(0) * TILE
    o_key = begin_key + tl.arange(0, TILE)
    m_key = o_key < real
    o_dim = tl.arange(0, HEAD_PADDED)
    b_k = load_columns(K + item * k_item + group * k_head, first + o_key, m_key, k_row, HEAD_DIM, HEAD_PADDED)
    b_v = load_columns(V + item * v_item + group * v_head, first + o_key, m_key, v_row, VALUE_DIM, VALUE_PADDED)
    b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)
    kept = item_group * num_keys + first + o_key
    grad_k = load_columns(KEPT_K, kept, m_key, HEAD_DIM, HEAD_DIM, HEAD_PADDED)
    grad_v = load_columns(KEPT_V, kept, m_key, VALUE_DIM, VALUE_DIM, VALUE_PADDED)
    narrowest = aligned_level(begin_key + 1, num_levels, NUM_BINS)  # of the widths whose K bins reach the tile
    for member in range(0, heads_per_group):
        head = group * heads_per_group + member
        item_head = item * heads + head
        centre = tl.load(CENTRE + head * HEAD_DIM + o_dim, mask=o_dim < HEAD_DIM, other=0.0).to(tl.float32)
        grad_centre = tl.zeros([HEAD_PADDED], tl.float32)
        for level in range(narrowest, num_levels):
            place = (item_head * num_levels + level) * NUM_BINS + (o_key >> level)
            grad_k, grad_v, grad_centre = _add_pooled(
                BIN_K, BIN_V, BIN_OFFSET, GRAD_BIN_K, GRAD_BIN_V, GRAD_BIN_OFFSET, place, m_key, b_k, b_v,
                centre, grad_k, grad_v, grad_centre, HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED,
            )  # fmt: skip
        if LOOKS_TWICE:
            grad_k, grad_v, grad_centre = _add_pooled(
                RUN_K, RUN_V, RUN_OFFSET, GRAD_RUN_K, GRAD_RUN_V, GRAD_RUN_OFFSET,
                item_head * num_runs + o_key // WIDTH, m_key, b_k, b_v,
                centre, grad_k, grad_v, grad_centre, HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED,
            )  # fmt: skip
        p_centre = GRAD_CENTRE + ((item * tl.num_programs(0) + tl.program_id(0)) * heads + head) * HEAD_DIM + o_dim
        tl.store(p_centre, grad_centre, mask=o_dim < HEAD_DIM)
    _store_keys(GRAD_K, grad_k, kept, m_key, HEAD_DIM, HEAD_PADDED)
    _store_keys(GRAD_V, grad_v, kept, m_key, VALUE_DIM, VALUE_PADDED)


@triton.jit
def _store_keys(P, tensor, o_key, m_key, DIM: tl.constexpr, PADDED: tl.constexpr):
    o_dim = tl.arange(0, PADDED)
    p_key = P + o_key[:, None] * DIM + o_dim[None, :]
    tl.store(p_key, tensor.to(P.dtype.element_ty), mask=m_key[:, None] & (o_dim < DIM)[None, :])
