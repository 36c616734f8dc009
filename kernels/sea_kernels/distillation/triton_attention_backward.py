"""Triton form of the attention loss's gradients, from both score tiles once more.

With the numbers of its row the gradient of a student's score has a closed form in its own tile,

    ds_j = g_divergence (a_j - t_j) + 2 g_square_error a_j (a_j - t_j - pull).

Keys gather theirs in a kernel of their own, which walks the rows and the query heads of a key head in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import cdiv, first_of_step, item_span, on_device, row_span, split_steps
from .triton_attention import RowNumbers, Tensors, arguments
from .triton_scores import keys_of_all, last_block_first, load_rows

GRADIENT_SIZE = 4096.0  # of the largest gradient that enters a half-precision product


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
    rows, unit = torch.stack((*numbers, grad_divergence, grad_square_error)), None
    if query.dtype == torch.float16:
        # A mean over all rows makes gradients far below what float16 can hold: they are scaled up for the products.
        grads = rows[len(numbers) :]
        largest = grads.abs().amax().clamp_min(1e-30)
        grads *= GRADIENT_SIZE / largest
        unit = largest / GRADIENT_SIZE
    args, sizes = arguments(tensors, spans, causal, teacher_scaling, scaling)
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
            narrow = sizes["TEACHER_PADDED"] + sizes["HEAD_PADDED"] <= 128 and query.itemsize == 2
            sizes["maxnreg"] = 168 if narrow else None  # three programs on a multiprocessor in place of two
            grid = cdiv(key.shape[2], sizes["KEYS"]), key.shape[1], batch
            _key_gradient_kernel[grid](*tensors, rows, unit, grad_key, *args, **sizes)
    return grad_query, grad_key


@triton.jit
def _row_numbers(NUMBERS, place, kind_size, m_row):
    """The numbers of some rows, log-sum-exps in base 2, as columns [ROWS, 1]; m_row: None for all."""
    LOG2E: tl.constexpr = 1.4426950408889634
    teacher_lse = _load_column(NUMBERS + place, m_row) * LOG2E
    lse = _load_column(NUMBERS + kind_size + place, m_row) * LOG2E
    pull = _load_column(NUMBERS + 2 * kind_size + place, m_row)
    grad_divergence = _load_column(NUMBERS + 3 * kind_size + place, m_row)
    grad_square_error = _load_column(NUMBERS + 4 * kind_size + place, m_row)
    return teacher_lse, lse, pull, grad_divergence, grad_square_error


@triton.jit
def _load_column(p_number, m_row):
    return (tl.load(p_number) if m_row is None else tl.load(p_number, mask=m_row, other=0.0))[:, None]


@triton.jit
def _score_gradient(
    b_tq, b_tk, b_q, b_k, teacher_scale, scale, keep, teacher_lse, lse, pull, grad_divergence, grad_square_error,
    TEACHER_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the student's scores in a tile [ROWS, KEYS]; keep: keys that each row sees, None for all."""
    targets = tl.dot(b_tq, tl.trans(b_tk), input_precision=TEACHER_PRECISION) * teacher_scale - teacher_lse
    scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale - lse
    teacher, student = tl.exp2(targets), tl.exp2(scores)
    if keep is not None:
        teacher, student = tl.where(keep, teacher, 0.0), tl.where(keep, student, 0.0)
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
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = last_block_first(num_queries, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    m_row = rows < num_queries
    place = (item * tl.num_programs(1) + head) * num_queries + rows
    b_tq = load_rows(TEACHER_Q + item * tq_item + head * tq_head, rows, m_row, tq_row, TEACHER_DIM, TEACHER_PADDED)
    b_q = load_rows(Q + item * q_item + head * q_head, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)
    kind_size = tl.num_programs(2) * tl.num_programs(1).to(tl.int64) * num_queries
    numbers = _row_numbers(NUMBERS, place, kind_size, m_row)
    TEACHER_K += item * tk_item + (head // teacher_heads_per_group) * tk_head + first.to(tl.int64) * tk_row
    K += item * k_item + (head // heads_per_group) * k_head + first.to(tl.int64) * k_row
    acc = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    full = keys_of_all(length, KEYS)
    for masked in tl.static_range(2):
        for begin in range(full if masked else 0, tl.max(length) if masked else full, KEYS):
            o_key = begin + tl.arange(0, KEYS)
            m_key = o_key < real if masked else None
            b_tk = load_rows(TEACHER_K, o_key, m_key, tk_row, TEACHER_DIM, TEACHER_PADDED)
            b_k = load_rows(K, o_key, m_key, k_row, HEAD_DIM, HEAD_PADDED)
            keep = o_key[None, :] < length[:, None] if masked else None
            grad = _score_gradient(
                b_tq, b_tk, b_q, b_k, teacher_scale, scale, keep, *numbers, TEACHER_PRECISION, PRECISION
            )
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
    full_row = first_row  # from here on rows see the whole block
    if CAUSAL:
        full_row = (block + 1) * KEYS - 1 - cached
    has_only_real_keys = (block * KEYS >= first) & ((block + 1) * KEYS <= first + real)
    full_row = tl.where(has_only_real_keys, full_row, last_row)
    before, full_steps, after = split_steps(first_row, full_row, last_row, ROWS)
    kind_size = tl.num_programs(2) * heads.to(tl.int64) * num_queries
    acc = tl.zeros([KEYS, HEAD_PADDED], tl.float32)
    for member in range(0, heads_per_group):
        head = group * heads_per_group + member
        p_tk = TEACHER_K + item * tk_item + (head // teacher_heads_per_group) * tk_head
        b_tk = load_rows(p_tk, o_key, m_key, tk_row, TEACHER_DIM, TEACHER_PADDED)
        p_tq, p_q = TEACHER_Q + item * tq_item + head * tq_head, Q + item * q_item + head * q_head
        for masked in tl.static_range(2):
            for step in range(0, before + after if masked else full_steps):
                rows = first_of_step(first_row, step, before, full_steps, ROWS, masked) + tl.arange(0, ROWS)
                _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
                m_row = length > 0 if masked else None
                b_tq = load_rows(p_tq, rows, m_row, tq_row, TEACHER_DIM, TEACHER_PADDED)
                b_q = load_rows(p_q, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)
                place = (item * heads + head) * num_queries + rows
                numbers = _row_numbers(NUMBERS, place, kind_size, m_row)
                keep = m_key[None, :] & ((o_key - first)[None, :] < length[:, None]) if masked else None
                grad = _score_gradient(
                    b_tq, b_tk, b_q, b_k, teacher_scale, scale, keep, *numbers, TEACHER_PRECISION, PRECISION
                )
                acc = tl.dot(tl.trans(grad.to(b_q.dtype)), b_q, acc, input_precision=PRECISION)
    o_dim = tl.arange(0, HEAD_PADDED)
    m_out = (o_key < num_keys)[:, None] & (o_dim < HEAD_DIM)[None, :]
    place = (item * tl.num_programs(1) + group) * num_keys + o_key
    p_out = GRAD_K + place[:, None] * HEAD_DIM + o_dim[None, :]
    tl.store(p_out, (acc * _gradient_unit(UNIT, scale)).to(GRAD_K.dtype.element_ty), mask=m_out)
