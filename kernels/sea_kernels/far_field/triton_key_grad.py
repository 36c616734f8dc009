"""Gradients of the far field to the keys and values that rows keep, without those that flow through pooling."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import aligned_level, item_span, row_span
from .triton_rows import add_rows, bits_of, kept_runs, rows_below
from .triton_walk import TILE, Walk, load_columns, window_begin


def kept_gradients(walk: Walk, grad_output: Tensor, log_sums: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """float32 ``[N, G, S, D]`` and ``[N, G, S, E]``, each item's from its first real key on, and undefined behind."""
    rows = walk.batch, walk.groups, walk.num_keys
    grad_key = torch.empty(*rows, walk.head_dim, dtype=torch.float32, device=walk.key.device)
    grad_value = torch.empty(*rows, walk.value_dim, dtype=torch.float32, device=walk.key.device)
    _kept_gradients_kernel[(triton.cdiv(walk.num_keys, TILE), walk.batch * walk.groups)](
        walk.key,
        walk.value,
        grad_key,
        grad_value,
        *walk.key.stride()[:3],
        *walk.value.stride()[:3],
        walk.heads // walk.groups,
        *walk.row_arguments(grad_output, log_sums, delta),
        **walk.sizes(),
        **walk.row_sizes(),
    )
    return grad_key, grad_value


@triton.jit(do_not_specialize=["heads_per_group", "num_queries", "num_keys", "num_levels", "stride", "scaling"])
def _kept_gradients_kernel(
    K,
    V,
    GRAD_K,
    GRAD_V,
    k_item,
    k_head,
    k_row,
    v_item,
    v_head,
    v_row,
    heads_per_group,
    Q,
    GRAD_OUT,
    LOG_SUM,
    DELTA,
    BITS,
    STARTS,
    SPANS,
    q_item,
    q_head,
    q_row,
    g_item,
    g_head,
    g_row,
    heads,
    num_queries,
    num_keys,
    num_levels,
    stride,
    scaling,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_LEVEL: tl.constexpr,
    CAUSAL: tl.constexpr,
    LOOKS_TWICE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    groups = heads // heads_per_group
    item_group = tl.program_id(1).to(tl.int64)
    item, group = item_group // groups, item_group % groups
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    begin_key = tl.program_id(0) * TILE
    first_run = begin_key // WIDTH
    o_key = begin_key + tl.arange(0, TILE)
    m_key = o_key < real
    o_dim, o_value = tl.arange(0, HEAD_PADDED), tl.arange(0, VALUE_PADDED)
    b_k = load_columns(K + item * k_item + group * k_head, first + o_key, m_key, k_row, HEAD_DIM, HEAD_PADDED)
    b_v = load_columns(V + item * v_item + group * v_head, first + o_key, m_key, v_row, VALUE_DIM, VALUE_PADDED)
    grad_k = tl.zeros([TILE, HEAD_PADDED], tl.float32)
    grad_v = tl.zeros([TILE, VALUE_PADDED], tl.float32)
    zeros = tl.zeros([TILE], tl.float32)
    begin_row, end_row = rows_below(begin_key, num_queries, num_keys, first, real, CAUSAL)
    for member in range(0, heads_per_group):
        head = group * heads_per_group + member
        row = (item * heads + head) * num_queries
        for row_step in range(begin_row, end_row, ROWS):
            rows = row_step + tl.arange(0, ROWS)
            position, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
            level = aligned_level(length, num_levels, NUM_BINS)
            sees = begin_key < length
            p_word = BITS + (row + rows) * (NUM_BINS // 32) + (begin_key >> level >> 5)
            word = tl.load(p_word, mask=sees, other=0)
            keep = bits_of(word, o_key[:, None] >> level[None, :])
            if LOOKS_TWICE:  # runs as wide as a bin, or wider, reach beyond the bins of the first look
                keep = keep | (level <= WIDTH_LEVEL)[None, :]
            keep = keep & (o_key[:, None] < length[None, :])
            if tl.max(keep.to(tl.int32)) > 0:
                if LOOKS_TWICE:
                    begin = window_begin(position, length, stride, WIDTH, HAS_WINDOW)
                    kept = kept_runs(STARTS, row + rows, sees, first_run, WIDTH, SLOTS)
                    near = bits_of(kept, (o_key // WIDTH - first_run)[:, None]) & (o_key[:, None] < begin[None, :])
                    keep = keep & (near | (o_key[:, None] >= begin[None, :]))
                if tl.max(keep.to(tl.int32)) > 0:
                    grad_k, grad_v, _ = add_rows(
                        b_k, b_v, zeros, keep,
                        Q + item * q_item + head * q_head, GRAD_OUT + item * g_item + head * g_head,
                        LOG_SUM + row, DELTA + row, rows, sees, q_row, g_row, scaling,
                        grad_k, grad_v, zeros, HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED, PRECISION,
                    )  # fmt: skip
    place = item_group * num_keys + o_key
    p_grad = GRAD_K + place[:, None] * HEAD_DIM + o_dim[None, :]
    tl.store(p_grad, grad_k * scaling, mask=m_key[:, None] & (o_dim < HEAD_DIM)[None, :])
    p_grad = GRAD_V + place[:, None] * VALUE_DIM + o_value[None, :]
    tl.store(p_grad, grad_v, mask=m_key[:, None] & (o_value < VALUE_DIM)[None, :])
