"""Triton form of the attention loss: two score tiles at once. ``triton_attention_backward.py`` has its gradients.

The student's log-sum-exps come from a first walk of the same program. The teacher's may be given.

Of every row only three numbers are kept between the passes: both log-sum-exps and ``sum_i a_i (a_i - t_i)``, called the
pull here.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import cdiv, item_span, on_device, row_span
from .triton_scores import (
    LOG2E,
    keys_of_all,
    last_block_first,
    load_rows,
    padded_width,
    product_precision,
    row_lse,
    rows_lse,
    tile_config,
)


class RowNumbers(NamedTuple):
    """What the backward pass needs of the rows, each float32 ``[N, H, T]``.

    Attributes:
        teacher_lse: logarithm of the teacher's sum of exponentials.
        lse: the student's.
        pull: ``sum_i a_i (a_i - t_i)``.
    """

    teacher_lse: Tensor
    lse: Tensor
    pull: Tensor


class Tensors(NamedTuple):
    """The inputs, each with contiguous rows: teacher's ``[N, H, T, D']``, ``[N, G', S, D']``, student's as usual."""

    teacher_query: Tensor
    teacher_key: Tensor
    query: Tensor
    key: Tensor


def attention_loss(
    tensors: Tensors,
    spans: Tensor | None,
    teacher_log_sum: Tensor | None,
    *,
    causal: bool,
    teacher_scaling: float,
    scaling: float,
) -> tuple[Tensor, Tensor, RowNumbers]:
    """Both losses of :func:`sea_kernels.attention_loss`, and what the backward pass needs. No gradients."""
    teacher_query, teacher_key, query, _ = tensors
    if teacher_log_sum is None:
        teacher_lse = row_lse(teacher_query, teacher_key, spans, causal=causal, scaling=teacher_scaling)
    else:
        teacher_lse = teacher_log_sum.float().contiguous()
    lse, divergence, square_error, pull = (torch.empty_like(teacher_lse) for _ in range(4))
    args, sizes = arguments(tensors, spans, causal, teacher_scaling, scaling)
    batch, heads, num_queries, _ = query.shape
    grid = cdiv(num_queries, sizes["ROWS"]), heads, batch
    with on_device(query):
        _loss_kernel[grid](*tensors, teacher_lse, lse, pull, divergence, square_error, *args, **sizes)
    return divergence, square_error, RowNumbers(teacher_lse, lse, pull)


def arguments(
    tensors: Tensors, spans: Tensor | None, causal: bool, teacher_scaling: float, scaling: float
) -> tuple[tuple, dict]:
    """Arguments and sizes that the kernels of both passes have in common."""
    heads, num_queries = tensors.query.shape[1:3]
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    args = spans, *strides, heads // tensors.teacher_key.shape[1], heads // tensors.key.shape[1]
    args += num_queries, tensors.key.shape[2], teacher_scaling * LOG2E, scaling * LOG2E
    sizes = {
        "TEACHER_DIM": tensors.teacher_query.shape[-1],
        "TEACHER_PADDED": padded_width(tensors.teacher_query),
        "HEAD_DIM": tensors.query.shape[-1],
        "HEAD_PADDED": padded_width(tensors.query),
        "CAUSAL": causal,
        "HAS_PADDING": spans is not None,
        "TEACHER_PRECISION": product_precision(tensors.teacher_query),
        "PRECISION": product_precision(tensors.query),
    }
    return args, sizes | tile_config(tensors.teacher_query, tensors.query)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "teacher_scale", "scale"])
def _loss_kernel(
    TEACHER_Q,
    TEACHER_K,
    Q,
    K,
    TEACHER_LSE,
    LSE,
    PULL,
    DIVERGENCE,
    SQUARE_ERROR,
    SPANS,
    tq_item,
    tq_head,
    tq_row,
    tk_item,
    tk_head,
    tk_row,
    q_item,
    q_head,
    q_row,
    k_item,
    k_head,
    k_row,
    teacher_heads_per_group,
    heads_per_group,
    num_queries,
    num_keys,
    teacher_scale,
    scale,
    TEACHER_DIM: tl.constexpr,
    TEACHER_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    LN2: tl.constexpr = 0.6931471805599453
    LOG2E: tl.constexpr = 1.4426950408889634
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = last_block_first(num_queries, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    m_row = rows < num_queries
    place = (item * tl.num_programs(1) + head) * num_queries + rows
    b_tq = load_rows(TEACHER_Q + item * tq_item + head * tq_head, rows, m_row, tq_row, TEACHER_DIM, TEACHER_PADDED)
    b_q = load_rows(Q + item * q_item + head * q_head, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)
    teacher_lse = tl.load(TEACHER_LSE + place, mask=m_row, other=0.0) * LOG2E
    TEACHER_K += item * tk_item + (head // teacher_heads_per_group) * tk_head + first.to(tl.int64) * tk_row
    K += item * k_item + (head // heads_per_group) * k_head + first.to(tl.int64) * k_row
    lse = rows_lse(b_q, K, k_row, length, real, scale, HEAD_DIM, HEAD_PADDED, ROWS, KEYS, PRECISION)
    tl.store(LSE + place, lse, mask=m_row)
    lse *= LOG2E
    divergence = tl.zeros([ROWS], tl.float32)
    square_error = tl.zeros([ROWS], tl.float32)
    pull = tl.zeros([ROWS], tl.float32)
    full = keys_of_all(length, KEYS)
    for masked in tl.static_range(2):
        for begin in range(full if masked else 0, tl.max(length) if masked else full, KEYS):
            o_key = begin + tl.arange(0, KEYS)
            m_key = o_key < real if masked else None
            b_tk = load_rows(TEACHER_K, o_key, m_key, tk_row, TEACHER_DIM, TEACHER_PADDED)
            b_k = load_rows(K, o_key, m_key, k_row, HEAD_DIM, HEAD_PADDED)
            targets = tl.dot(b_tq, tl.trans(b_tk), input_precision=TEACHER_PRECISION) * teacher_scale
            targets -= teacher_lse[:, None]
            scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale - lse[:, None]
            teacher, student, difference = tl.exp2(targets), tl.exp2(scores), targets - scores
            if masked:
                keep = o_key[None, :] < length[:, None]  # [ROWS, KEYS]
                teacher, student = tl.where(keep, teacher, 0.0), tl.where(keep, student, 0.0)
                difference = tl.where(keep, difference, 0.0)
            error = student - teacher
            divergence += tl.sum(teacher * difference, 1)
            square_error += tl.sum(error * error, 1)
            pull += tl.sum(student * error, 1)
    tl.store(DIVERGENCE + place, divergence * LN2, mask=m_row)
    tl.store(SQUARE_ERROR + place, square_error, mask=m_row)
    tl.store(PULL + place, pull, mask=m_row)
