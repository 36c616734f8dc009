"""Gradient of queries from that of their scores against aligned bins, a block of rows at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import aligned_level, cdiv, item_span, next_power_of_2
from .triton import BLOCK_ROWS, pool_own_bin

BLOCK_BINS = 32


def query_gradient(
    query: Tensor,
    key: Tensor,
    grad_output: Tensor,
    pooled: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    spans: Tensor | None,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient to query, and float32 ``[N, H, T]``: what flows to each row's last bin, all beyond it included.

    With weights also parts of their gradients, to be added up: float32 ``[2, N, programs, H]``.
    """
    batch, heads, num_queries, head_dim = query.shape
    groups, levels, num_bins, parts = pooled.shape[1:5]
    new = torch.empty if spans is None else torch.zeros  # no program visits rows of padding
    grad_query = new(query.shape, dtype=query.dtype, device=query.device)
    tail = new(query.shape[:3], dtype=torch.float32, device=query.device)
    programs = cdiv(num_queries, BLOCK_ROWS) + 1
    sums = None if weights is None else tail.new_empty(2, batch, programs, heads)
    padded = max(16, next_power_of_2(head_dim))
    full = query.dtype == torch.float32  # products outside the matrix units, which need more registers
    _query_gradient_kernel[(programs, heads, batch)](
        query,
        key,
        pooled,
        *(weights or (None, None)),
        grad_output,
        grad_query,
        tail,
        sums,
        spans,
        *query.stride()[:3],
        *key.stride()[:3],
        *grad_output.stride()[:3],
        num_queries,
        key.shape[2],
        levels,
        heads // groups,
        scaling,
        HEAD_DIM=head_dim,
        HEAD_PADDED=padded,
        PARTS=parts,
        NUM_BINS=num_bins,
        BINS=BLOCK_BINS,
        ROWS=BLOCK_ROWS,
        CAUSAL=causal,
        HAS_PADDING=spans is not None,
        PRECISION="ieee" if full else "tf32",
        num_warps=gradient_warps(query, weights is not None),
        num_stages=1 if full else 2,
    )
    return grad_query, tail, sums


def gradient_warps(query: Tensor, weighted: bool) -> int:
    """Warps of the kernels that sum rows of gradients: eight where four have too few registers."""
    return 8 if query.dtype == torch.float32 or query.shape[-1] > (64 if weighted else 128) else 4


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "heads_per_group", "scaling"])
def _query_gradient_kernel(
    Q,
    K,
    POOLED,
    MEAN_WEIGHT,
    BOUND_WEIGHT,
    GRAD,
    GRAD_Q,
    TAIL,
    SUMS,
    SPANS,
    q_item,
    q_head,
    q_row,
    k_item,
    k_head,
    k_row,
    g_item,
    g_head,
    g_row,
    num_queries,
    num_keys,
    num_levels,
    heads_per_group,
    scaling,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    group = head // heads_per_group
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    offset = num_keys - num_queries - first  # position of row 0; negative where the queries begin with padding
    begin = (tl.maximum(offset, 0) // ROWS + tl.program_id(0)) * ROWS
    position = begin + tl.arange(0, ROWS)
    rows = (position - offset).to(tl.int64)
    m_row = (rows >= 0) & (rows < num_queries) & (position < real)
    o_dim = tl.arange(0, HEAD_PADDED)
    m_dim = o_dim < HEAD_DIM
    m_q = m_row[:, None] & m_dim[None, :]
    # A block past the end must not reach a level that was not pooled.
    level = aligned_level(tl.minimum(begin + 1, real) if CAUSAL else real, num_levels, NUM_BINS)
    last = (position if CAUSAL else position * 0 + tl.maximum(real - 1, 0)) >> level
    POOLED += ((item * (heads // heads_per_group) + group) * num_levels + level) * (NUM_BINS * PARTS * HEAD_DIM)
    p_grad = GRAD + item * g_item + head * g_head + rows[:, None] * g_row
    tail = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, HEAD_PADDED], tl.float32)  # sums of the vectors that the parts have
    center = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    half = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    for first_bin in range(0, NUM_BINS, BINS):
        o_bin = first_bin + tl.arange(0, BINS)
        b_grad = tl.load(p_grad + o_bin[None, :], mask=m_row[:, None], other=0.0)  # [ROWS, BINS]
        beyond = o_bin[None, :] >= last[:, None]
        tail += tl.sum(tl.where(beyond, b_grad.to(tl.float32), 0.0), 1)
        index = o_bin
        if CAUSAL:
            b_grad = tl.where(beyond, 0.0, b_grad)
        else:
            index = tl.minimum(o_bin, tl.max(last))
        b_grad = b_grad.to(Q.dtype.element_ty)
        p_bin = POOLED + index[:, None] * (PARTS * HEAD_DIM) + o_dim[None, :]
        if PARTS != 2:
            b_mean = tl.load(p_bin, mask=m_dim[None, :], other=0.0)  # [BINS, HEAD]
            mean = tl.dot(b_grad, b_mean, mean, input_precision=PRECISION)
        if PARTS > 1:
            b_center = tl.load(p_bin + (PARTS - 2) * HEAD_DIM, mask=m_dim[None, :], other=0.0)
            center = tl.dot(b_grad, b_center, center, input_precision=PRECISION)
            b_half = tl.load(p_bin + (PARTS - 1) * HEAD_DIM, mask=m_dim[None, :], other=0.0)
            half = tl.dot(b_grad, b_half, half, input_precision=PRECISION)
    place = (item * heads + head) * num_queries + rows
    tl.store(TAIL + place, tail, mask=m_row)

    p_q = Q + item * q_item + head * q_head + rows[:, None] * q_row + o_dim[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0).to(tl.float32)
    if CAUSAL:
        p_k = K + item * k_item + group * k_head + first.to(tl.int64) * k_row + o_dim[None, :]
        total, highest, lowest, count = pool_own_bin(
            p_k, k_row, m_dim, begin, position, real, level, PARTS, ROWS, HEAD_PADDED
        )
        if PARTS != 2:
            mean += (tail * scaling / count.to(tl.float32))[:, None] * total
        if PARTS > 1:
            center += (tail * scaling)[:, None] * tl.where(b_q * scaling > 0, highest, lowest)
    # The bound has no slope where q is 0, as in the PyTorch form.
    bound = tl.where(b_q > 0, center + half, tl.where(b_q < 0, center - half, 0.0))
    grad = mean + bound
    if PARTS == 3:  # scores are products with q, and bounds with its positive and negative part
        p_sum = SUMS + (item * tl.num_programs(0) + tl.program_id(0)) * heads + head
        tl.store(p_sum, tl.sum(tl.sum(tl.where(m_q, b_q * mean, 0.0), 1), 0))
        p_sum += tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * heads
        tl.store(p_sum, tl.sum(tl.sum(tl.where(m_q, b_q * bound, 0.0), 1), 0))
        grad = mean * tl.load(MEAN_WEIGHT + head).to(tl.float32)
        grad += bound * tl.load(BOUND_WEIGHT + head).to(tl.float32)
    tl.store(GRAD_Q + place[:, None] * HEAD_DIM + o_dim[None, :], grad.to(GRAD_Q.dtype.element_ty), mask=m_q)
