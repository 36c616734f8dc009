"""Backward pass of the scores against aligned bins in Triton: deterministic, in memory linear in T.

With G the gradient to a row's scores, the query's gradient is a product of G with the pooled keys, and that of pooled
keys one of G, transposed, with the rows that read them. A causal row's own bin and those beyond it all have one score:
their gradients are added up first (``tail``), and flow to the keys that the row's own bin holds so far.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import (
    aligned_level,
    cdiv,
    count_levels,
    item_span,
    item_spans,
    next_power_of_2,
    on_device,
    with_dense_rows,
)
from .triton import pool_shared_bins
from .triton_key_grad import key_gradient
from .triton_query_grad import BLOCK_BINS, gradient_warps, query_gradient

SPLIT_ROWS = 8192  # rows of the input for each part that a walk over rows is cut into
MOST_SPLITS = 8


def pooled_scores_gradients(
    query: Tensor,
    key: Tensor,
    grad_output: Tensor,
    *,
    num_bins: int,
    causal: bool,
    scaling: float,
    statistic: str,
    attention_mask: Tensor | None,
    want_key: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients to query and, if wanted, to key, in their dtypes. Aligned bins only.

    A maximum or minimum that several keys of a bin share passes its gradient to the first of them.

    Args:
        query, key, num_bins, causal, scaling, statistic, attention_mask: what the forward pass took.
        grad_output: ``[N, H, T, K]`` in query's dtype.
        want_key: whether the key needs a gradient.
    """
    spans = item_spans(attention_mask)
    query, key, grad_output = with_dense_rows(query), with_dense_rows(key), with_dense_rows(grad_output)
    with on_device(query):
        levels = count_levels(key.shape[2], num_bins)
        pooled = pool_shared_bins(key, num_bins, levels, spans, scaling, statistic)
        rows = query, key, grad_output, pooled, None, spans, causal, scaling
        grad_query, tail, _ = query_gradient(*rows)
        return grad_query, _key_gradient(*rows, tail) if want_key else None


def weighted_scores_gradients(
    query: Tensor,
    key: Tensor,
    mean_weight: Tensor,
    bound_weight: Tensor,
    pooled: Tensor,
    grad_output: Tensor,
    *,
    causal: bool,
    scaling: float,
    attention_mask: Tensor | None,
    want_key: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients to query, key (if wanted) and both weights, in their dtypes. Aligned bins only.

    Args:
        query, key, mean_weight, bound_weight, causal, scaling, attention_mask: what the forward pass took.
        pooled: what it left.
        grad_output: float32 ``[N, H, T, K]``.
        want_key: whether the key needs a gradient.
    """
    spans = item_spans(attention_mask)
    query, key, grad_output = with_dense_rows(query), with_dense_rows(key), with_dense_rows(grad_output)
    weights = mean_weight, bound_weight
    with on_device(query):
        rows = query, key, grad_output, pooled, weights, spans, causal, scaling
        grad_query, tail, sums = query_gradient(*rows)
        grad_key = _key_gradient(*rows, tail) if want_key else None
    grads = sums.sum((1, 2)).to(mean_weight.dtype)
    return grad_query, grad_key, grads[0], grads[1]


def _key_gradient(
    query: Tensor,
    key: Tensor,
    grad_output: Tensor,
    pooled: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    spans: Tensor | None,
    causal: bool,
    scaling: float,
    tail: Tensor,
) -> Tensor:
    grad_pooled = _pooled_gradient(query, grad_output, pooled, weights, tail, spans, causal, scaling, key.shape[2])
    return key_gradient(query, key, tail, grad_pooled, weights, spans, causal, scaling)


def _pooled_gradient(
    query: Tensor,
    grad_output: Tensor,
    pooled: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    tail: Tensor,
    spans: Tensor | None,
    causal: bool,
    scaling: float,
    num_keys: int,
) -> Tensor:
    """Gradient to means, to maxima and minima, or to all three of the bins: float32 ``[N, G, levels, K, parts, D]``."""
    batch, heads, num_queries, head_dim = query.shape
    groups, levels, num_bins, parts = pooled.shape[1:5]
    splits = min(MOST_SPLITS, cdiv(num_queries, SPLIT_ROWS))
    grad = torch.empty(splits, *pooled.shape, dtype=torch.float32, device=query.device)
    padded = max(16, next_power_of_2(head_dim))
    full = query.dtype == torch.float32  # products outside the matrix units, which need more registers
    _pooled_gradient_kernel[(levels * num_bins // BLOCK_BINS, batch * groups, splits)](
        query,
        grad_output,
        *(weights or (None, None)),
        tail,
        grad,
        spans,
        *query.stride()[:3],
        *grad_output.stride()[:3],
        num_queries,
        num_keys,
        levels,
        groups,
        heads // groups,
        scaling,
        HEAD_DIM=head_dim,
        HEAD_PADDED=padded,
        PARTS=parts,
        NUM_BINS=num_bins,
        BINS=BLOCK_BINS,
        ROWS=32 if full or padded > 128 else 64,
        CAUSAL=causal,
        HAS_PADDING=spans is not None,
        PRECISION="ieee" if full else "tf32",
        num_warps=gradient_warps(query, weights is not None),
        num_stages=1 if full else 2,
    )
    return grad.sum(0) if splits > 1 else grad[0]


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "groups", "heads_per_group", "scaling"])
def _pooled_gradient_kernel(
    Q,
    GRAD,
    MEAN_WEIGHT,
    BOUND_WEIGHT,
    TAIL,
    GRAD_POOLED,
    SPANS,
    q_item,
    q_head,
    q_row,
    g_item,
    g_head,
    g_row,
    num_queries,
    num_keys,
    num_levels,
    groups,
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
    TILES: tl.constexpr = NUM_BINS // BINS
    level = num_levels - 1 - tl.program_id(0) // TILES  # the longest walks first
    first_bin = tl.program_id(0) % TILES * BINS
    item_group = tl.program_id(1).to(tl.int64)
    item, group = item_group // groups, item_group % groups
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    offset = num_keys - num_queries - first
    if CAUSAL:  # rows of one level lie side by side, and read a bin as soon as it is complete
        shortest = tl.where(level > 0, NUM_BINS << tl.maximum(level - 1, 0), 0)
        begin = tl.maximum((first_bin + 1) << level, shortest)
        end = tl.minimum(NUM_BINS << level, real)
    else:  # rows of an item are all of one level
        begin = real * 0
        end = tl.where(aligned_level(real, num_levels, NUM_BINS) == level, real, 0)
    begin_row, end_row = tl.maximum(begin - offset, 0), tl.minimum(end - offset, num_queries)
    part = tl.cdiv(tl.cdiv(tl.maximum(end_row - begin_row, 0), tl.num_programs(2)), ROWS) * ROWS
    begin_row += tl.program_id(2) * part
    end_row = tl.minimum(begin_row + part, end_row)

    o_bin, o_dim = first_bin + tl.arange(0, BINS), tl.arange(0, HEAD_PADDED)
    m_dim = (o_dim < HEAD_DIM)[None, :]
    upper = tl.zeros([BINS, HEAD_PADDED], tl.float32)  # to means or maxima
    lower = tl.zeros([BINS, HEAD_PADDED], tl.float32)  # to minima
    if PARTS == 3:  # weighted sums over the heads
        mean = tl.zeros([BINS, HEAD_PADDED], tl.float32)
        highest = tl.zeros([BINS, HEAD_PADDED], tl.float32)
        lowest = tl.zeros([BINS, HEAD_PADDED], tl.float32)
    for member in range(0, heads_per_group):
        head = group * heads_per_group + member
        p_q = Q + item * q_item + head * q_head + o_dim[None, :]
        p_grad = GRAD + item * g_item + head * g_head + o_bin[None, :]
        for row_step in range(begin_row, end_row, ROWS):
            rows = (row_step + tl.arange(0, ROWS)).to(tl.int64)
            m_row = rows < end_row
            b_q = tl.load(p_q + rows[:, None] * q_row, mask=m_row[:, None] & m_dim, other=0.0)  # [ROWS, HEAD]
            b_grad = tl.load(p_grad + rows[:, None] * g_row, mask=m_row[:, None], other=0.0)  # [ROWS, BINS]
            if CAUSAL:
                own = ((rows + offset) >> level)[:, None]
                b_grad = tl.where(o_bin[None, :] < own, b_grad, 0.0)
            else:
                last = tl.maximum(real - 1, 0) >> level
                p_tail = TAIL + (item_group * heads_per_group + member) * num_queries + rows
                b_tail = tl.load(p_tail, mask=m_row, other=0.0)[:, None]
                b_grad = tl.where(o_bin[None, :] < last, b_grad.to(tl.float32), 0.0)
                b_grad = tl.where(o_bin[None, :] == last, b_tail, b_grad)
            b_grad = tl.trans(b_grad.to(b_q.dtype))
            if PARTS == 1:
                upper = tl.dot(b_grad, b_q, upper, input_precision=PRECISION)
            else:
                rises = b_q.to(tl.float32) * scaling > 0
                b_upper = tl.where(rises, b_q, 0.0).to(b_q.dtype)
                b_lower = tl.where(rises, 0.0, b_q).to(b_q.dtype)
                upper = tl.dot(b_grad, b_upper, upper, input_precision=PRECISION)
                lower = tl.dot(b_grad, b_lower, lower, input_precision=PRECISION)
        if PARTS == 3:
            mean += (upper + lower) * tl.load(MEAN_WEIGHT + head).to(tl.float32)
            bound_weight = tl.load(BOUND_WEIGHT + head).to(tl.float32)
            highest += upper * bound_weight
            lowest += lower * bound_weight
            upper = tl.zeros([BINS, HEAD_PADDED], tl.float32)
            lower = tl.zeros([BINS, HEAD_PADDED], tl.float32)
    place = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + item_group) * num_levels + level
    p_out = GRAD_POOLED + (place * NUM_BINS + o_bin)[:, None] * (PARTS * HEAD_DIM) + o_dim[None, :]
    m_out = (o_bin >= 0)[:, None] & m_dim
    if PARTS == 3:
        tl.store(p_out, mean * scaling, mask=m_out)
        tl.store(p_out + HEAD_DIM, highest * scaling, mask=m_out)
        tl.store(p_out + 2 * HEAD_DIM, lowest * scaling, mask=m_out)
    else:
        tl.store(p_out, upper * scaling, mask=m_out)
    if PARTS == 2:
        tl.store(p_out + HEAD_DIM, lower * scaling, mask=m_out)
