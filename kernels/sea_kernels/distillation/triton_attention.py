"""Triton form of the attention loss: two score tiles at once, in the forward pass and again in the backward pass.

The student's log-sum-exps come from a first walk of the same program. The teacher's may be given.

Of every row only three numbers are kept between the passes: both log-sum-exps and ``sum_i a_i (a_i - t_i)``, called the
pull here. With them the gradient of a student's score has a closed form in its own tile,

    ds_j = g_divergence (a_j - t_j) + 2 g_square_error a_j (a_j - t_j - pull).

Keys gather theirs in a kernel of their own, which walks the rows and the query heads of a key head in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import cdiv, item_span, on_device, row_span, split_eight
from .triton_scores import (
    LOG2E,
    last_block_first,
    load_rows,
    padded_width,
    product_precision,
    row_lse,
    rows_lse,
    tile_config,
)

GRADIENT_SIZE = 4096.0  # of the largest gradient that enters a half-precision product


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
    args, sizes = _arguments(tensors, spans, causal, teacher_scaling, scaling)
    batch, heads, num_queries, _ = query.shape
    grid = cdiv(num_queries, sizes["ROWS"]), heads, batch
    with on_device(query):
        _loss_kernel[grid](*tensors, teacher_lse, lse, pull, divergence, square_error, *args, **sizes)
    return divergence, square_error, RowNumbers(teacher_lse, lse, pull)


def attention_gradients(
    grad_divergence: Tensor,
    grad_square_error: Tensor,
    tensors: Tensors,
    numbers: RowNumbers,
    spans: Tensor | None,
    *,
    causal: bool,
    teacher_scaling: float,
    scaling: float,
    want_query: bool,
    want_key: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of both losses with respect to the student's query and key, each only if wanted."""
    query, key = tensors.query, tensors.key
    # One tensor, so that a kernel can load all numbers of some rows at once.
    rows, unit = torch.stack((*numbers, grad_divergence, grad_square_error)), None
    if query.dtype == torch.float16:
        # A mean over all rows makes gradients far below what float16 can hold: they are scaled up for the products.
        grads = rows[len(numbers) :]
        largest = grads.abs().amax().clamp_min(1e-30)
        grads *= GRADIENT_SIZE / largest
        unit = largest / GRADIENT_SIZE
    args, sizes = _arguments(tensors, spans, causal, teacher_scaling, scaling)
    batch, heads, num_queries, _ = query.shape
    grad_query = grad_key = None
    with on_device(query):
        if want_query:
            grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
            grid = cdiv(num_queries, sizes["ROWS"]), heads, batch
            _query_gradient_kernel[grid](*tensors, rows, unit, grad_query, *args, **sizes)
        if want_key:
            # Here a program owns keys and walks rows.
            grad_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
            sizes |= {"ROWS": sizes["KEYS"], "KEYS": sizes["ROWS"]}
            grid = cdiv(key.shape[2], sizes["KEYS"]), key.shape[1], batch
            _key_gradient_kernel[grid](*tensors, rows, unit, grad_key, *args, **sizes)
    return grad_query, grad_key


def _arguments(
    tensors: Tensors, spans: Tensor | None, causal: bool, teacher_scaling: float, scaling: float
) -> tuple[tuple, dict]:
    """Arguments and sizes that all three kernels have in common."""
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
    for begin in range(0, tl.max(length), KEYS):
        o_key = begin + tl.arange(0, KEYS)
        b_tk = load_rows(TEACHER_K, o_key, o_key < real, tk_row, TEACHER_DIM, TEACHER_PADDED)
        b_k = load_rows(K, o_key, o_key < real, k_row, HEAD_DIM, HEAD_PADDED)
        keep = o_key[None, :] < length[:, None]  # [ROWS, KEYS]
        targets = tl.dot(b_tq, tl.trans(b_tk), input_precision=TEACHER_PRECISION) * teacher_scale
        targets = tl.where(keep, targets - teacher_lse[:, None], 0.0)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        scores = tl.where(keep, scores - lse[:, None], 0.0)
        teacher = tl.where(keep, tl.exp2(targets), 0.0)
        student = tl.where(keep, tl.exp2(scores), 0.0)
        error = student - teacher
        divergence += tl.sum(teacher * (targets - scores), 1)
        square_error += tl.sum(error * error, 1)
        pull += tl.sum(student * error, 1)
    tl.store(DIVERGENCE + place, divergence * LN2, mask=m_row)
    tl.store(SQUARE_ERROR + place, square_error, mask=m_row)
    tl.store(PULL + place, pull, mask=m_row)


@triton.jit
def _score_gradient(targets, scores, keep, pull, grad_divergence, grad_square_error):
    """Gradient of the student's scores in a tile, from both score tiles less their log-sum-exps."""
    teacher = tl.where(keep, tl.exp2(targets), 0.0)
    student = tl.where(keep, tl.exp2(scores), 0.0)
    error = student - teacher
    return grad_divergence * error + 2.0 * grad_square_error * student * (error - pull)


@triton.jit
def _gradient_unit(UNIT, scale):
    """What a sum over tiles lacks: the factor of the scores, and the unit of scaled gradients."""
    LN2: tl.constexpr = 0.6931471805599453
    unit = scale * LN2
    if UNIT is not None:
        unit *= tl.load(UNIT)
    return unit


@triton.jit(do_not_specialize=["num_queries", "num_keys", "teacher_scale", "scale"])
def _query_gradient_kernel(
    TEACHER_Q,
    TEACHER_K,
    Q,
    K,
    NUMBERS,
    UNIT,
    GRAD_Q,
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
    LOG2E: tl.constexpr = 1.4426950408889634
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = last_block_first(num_queries, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    m_row = rows < num_queries
    place = (item * tl.num_programs(1) + head) * num_queries + rows
    b_tq = load_rows(TEACHER_Q + item * tq_item + head * tq_head, rows, m_row, tq_row, TEACHER_DIM, TEACHER_PADDED)
    b_q = load_rows(Q + item * q_item + head * q_head, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)
    kind_size = tl.num_programs(2) * tl.num_programs(1).to(tl.int64) * num_queries
    teacher_lse = tl.load(NUMBERS + place, mask=m_row, other=0.0)[:, None] * LOG2E
    lse = tl.load(NUMBERS + kind_size + place, mask=m_row, other=0.0)[:, None] * LOG2E
    pull = tl.load(NUMBERS + 2 * kind_size + place, mask=m_row, other=0.0)[:, None]
    grad_divergence = tl.load(NUMBERS + 3 * kind_size + place, mask=m_row, other=0.0)[:, None]
    grad_square_error = tl.load(NUMBERS + 4 * kind_size + place, mask=m_row, other=0.0)[:, None]
    TEACHER_K += item * tk_item + (head // teacher_heads_per_group) * tk_head + first.to(tl.int64) * tk_row
    K += item * k_item + (head // heads_per_group) * k_head + first.to(tl.int64) * k_row
    acc = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    for begin in range(0, tl.max(length), KEYS):
        o_key = begin + tl.arange(0, KEYS)
        b_tk = load_rows(TEACHER_K, o_key, o_key < real, tk_row, TEACHER_DIM, TEACHER_PADDED)
        b_k = load_rows(K, o_key, o_key < real, k_row, HEAD_DIM, HEAD_PADDED)
        keep = o_key[None, :] < length[:, None]  # [ROWS, KEYS]
        targets = tl.dot(b_tq, tl.trans(b_tk), input_precision=TEACHER_PRECISION) * teacher_scale - teacher_lse
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale - lse
        grad = _score_gradient(targets, scores, keep, pull, grad_divergence, grad_square_error)
        acc = tl.dot(grad.to(b_k.dtype), b_k, acc, input_precision=PRECISION)
    o_dim = tl.arange(0, HEAD_PADDED)
    m_out = m_row[:, None] & (o_dim < HEAD_DIM)[None, :]
    p_out = GRAD_Q + place[:, None] * HEAD_DIM + o_dim[None, :]
    tl.store(p_out, (acc * _gradient_unit(UNIT, scale)).to(GRAD_Q.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "teacher_scale", "scale"])
def _key_gradient_kernel(
    TEACHER_Q,
    TEACHER_K,
    Q,
    K,
    NUMBERS,
    UNIT,
    GRAD_K,
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
    LOG2E: tl.constexpr = 1.4426950408889634
    block, group, item = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) * heads_per_group
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    o_key = block * KEYS + tl.arange(0, KEYS)  # counted from the first key, real or not: every key gets a gradient
    m_key = (o_key >= first) & (o_key < first + real)
    b_k = load_rows(K + item * k_item + group * k_head, o_key, m_key, k_row, HEAD_DIM, HEAD_PADDED)
    # Real rows, and of causal ones those that see a key of this block.
    cached = num_keys - num_queries
    first_row = tl.maximum(first - cached, 0)
    if CAUSAL:
        first_row = tl.maximum(first_row, block * KEYS - cached)
    last_row = tl.minimum(first + real - cached, num_queries)
    has_real_keys = (block * KEYS < first + real) & ((block + 1) * KEYS > first)
    last_row = tl.where(has_real_keys, last_row, first_row)
    o_kind = tl.arange(0, 8)[:, None]  # of the numbers, which are five
    kind_size = tl.num_programs(2) * heads.to(tl.int64) * num_queries
    acc = tl.zeros([KEYS, HEAD_PADDED], tl.float32)
    for member in range(0, heads_per_group):
        head = group * heads_per_group + member
        p_tk = TEACHER_K + item * tk_item + (head // teacher_heads_per_group) * tk_head
        b_tk = load_rows(p_tk, o_key, m_key, tk_row, TEACHER_DIM, TEACHER_PADDED)
        for begin in range(first_row, last_row, ROWS):
            rows = begin + tl.arange(0, ROWS)
            _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
            m_row = length > 0
            place = (item * heads + head) * num_queries + rows
            p_tq, p_q = TEACHER_Q + item * tq_item + head * tq_head, Q + item * q_item + head * q_head
            b_tq = load_rows(p_tq, rows, m_row, tq_row, TEACHER_DIM, TEACHER_PADDED)
            b_q = load_rows(p_q, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)
            p_numbers = NUMBERS + o_kind * kind_size + place[None, :]
            numbers = tl.load(p_numbers, mask=(o_kind < 5) & m_row[None, :], other=0.0)
            teacher_lse, lse, pull, grad_divergence, grad_square_error, _, _, _ = split_eight(numbers)
            keep = m_key[:, None] & ((o_key - first)[:, None] < length[None, :])  # [KEYS, ROWS]
            targets = tl.dot(b_tk, tl.trans(b_tq), input_precision=TEACHER_PRECISION) * teacher_scale
            targets -= teacher_lse[None, :] * LOG2E
            scores = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale - lse[None, :] * LOG2E
            own = pull[None, :], grad_divergence[None, :], grad_square_error[None, :]
            grad = _score_gradient(targets, scores, keep, *own)
            acc = tl.dot(grad.to(b_q.dtype), b_q, acc, input_precision=PRECISION)
    o_dim = tl.arange(0, HEAD_PADDED)
    m_out = (o_key < num_keys)[:, None] & (o_dim < HEAD_DIM)[None, :]
    place = (item * tl.num_programs(1) + group) * num_keys + o_key
    p_out = GRAD_K + place[:, None] * HEAD_DIM + o_dim[None, :]
    tl.store(p_out, (acc * _gradient_unit(UNIT, scale)).to(GRAD_K.dtype.element_ty), mask=m_out)
