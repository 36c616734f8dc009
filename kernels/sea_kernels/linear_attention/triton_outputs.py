"""Kernels that write rows: a block of rows against states, and for causal rows against the keys of their segment."""

import triton
import triton.language as tl

from ..triton_common import item_span, row_span
from .triton_features import exp_features, half_norms, load_rows, project, relu_features, rounded


@triton.jit(
    do_not_specialize=["num_queries", "num_keys", "first_block", "first_segment", "segments", "q_scale", "k_scale"]
)
def causal_output_kernel(
    Q,
    K,
    V,
    P,
    KEY_VALUE,
    KEY_SUM,
    OUT,
    NORMALISER,
    SPANS,
    q_item,
    q_head,
    q_row,
    k_item,
    k_head,
    k_row,
    v_item,
    v_head,
    v_row,
    num_queries,
    num_keys,
    heads_per_group,
    first_block,
    first_segment,
    segments,
    q_scale,
    k_scale,
    NUM_FEATURES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    SUM_EPSILON: tl.constexpr = 1e-6
    BLOCKS: tl.constexpr = SEGMENT // BLOCK
    block, head, item = first_block + tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    group = head // heads_per_group
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    o_place, o_value = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, VALUE_PADDED)
    m_value = (o_value < VALUE_DIM)[None, :]
    rows = o_place - (num_keys - num_queries)
    m_row = (rows >= 0) & (rows < num_queries)
    _, length = row_span(rows, num_queries, num_keys, first, real, True)
    p_q = Q + item * q_item + head.to(tl.int64) * q_head + rows.to(tl.int64) * q_row
    b_q = load_rows(p_q, m_row, HEAD_DIM, HEAD_PADDED)
    K += item * k_item + group.to(tl.int64) * k_head
    V += item * v_item + group.to(tl.int64) * v_head
    acc = tl.zeros([BLOCK, VALUE_PADDED], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)

    # The segment's own keys.
    for other in range(block // BLOCKS * BLOCKS, block + 1):
        o_key = other * BLOCK + tl.arange(0, BLOCK)
        m_key = (o_key >= first) & (o_key < first + real)
        b_k = load_rows(K + o_key.to(tl.int64) * k_row, m_key, HEAD_DIM, HEAD_PADDED)
        weights = tl.zeros([BLOCK, BLOCK], tl.float32)
        for begin in range(0, NUM_FEATURES, TILE):
            o_feature = begin + tl.arange(0, TILE)
            m_feature = (o_feature < NUM_FEATURES)[None, :]
            projected = project(b_q, P, o_feature, q_scale, NUM_FEATURES, HEAD_DIM, HEAD_PADDED, PRECISION)
            b_fq = relu_features(projected, m_feature, PRECISION)  # [BLOCK, TILE]
            projected = project(b_k, P, o_feature, k_scale, NUM_FEATURES, HEAD_DIM, HEAD_PADDED, PRECISION)
            b_fk = relu_features(projected, m_feature, PRECISION)
            weights = tl.dot(b_fq, tl.trans(b_fk), weights, input_precision=PRECISION)
        weights = tl.where(m_key[None, :] & (o_key[None, :] <= o_place[:, None]), weights, 0.0)
        weights = rounded(weights, PRECISION)
        p_v = V + o_key.to(tl.int64)[:, None] * v_row + o_value[None, :]
        b_v = tl.load(p_v, mask=m_key[:, None] & m_value, other=0.0).to(tl.float32)  # [BLOCK, VALUE]
        acc = tl.dot(weights, b_v, acc, input_precision=PRECISION)
        total += tl.sum(weights, 1)

    # All keys before.
    state = ((item * (heads // heads_per_group) + group) * segments + block // BLOCKS - first_segment) * NUM_FEATURES
    for begin in range(0, NUM_FEATURES, TILE):
        o_feature = begin + tl.arange(0, TILE)
        m_feature = o_feature < NUM_FEATURES
        projected = project(b_q, P, o_feature, q_scale, NUM_FEATURES, HEAD_DIM, HEAD_PADDED, PRECISION)
        b_fq = relu_features(projected, m_feature[None, :], PRECISION)
        p_state = KEY_VALUE + (state + o_feature)[:, None] * VALUE_DIM + o_value[None, :]
        b_state = rounded(tl.load(p_state, mask=m_feature[:, None] & m_value, other=0.0), PRECISION)  # [TILE, VALUE]
        acc = tl.dot(b_fq, b_state, acc, input_precision=PRECISION)
        b_sum = tl.load(KEY_SUM + state + o_feature, mask=m_feature, other=0.0)
        total += tl.sum(b_fq * (b_sum + SUM_EPSILON)[None, :], 1)

    out = tl.where((length > 0)[:, None], acc / tl.where(length > 0, total, 1.0)[:, None], 0.0)
    place = (item * heads + head) * num_queries + rows
    tl.store(NORMALISER + place, total, mask=m_row)
    p_out = OUT + place[:, None] * VALUE_DIM + o_value[None, :]
    tl.store(p_out, out.to(OUT.dtype.element_ty), mask=m_row[:, None] & m_value)


@triton.jit(do_not_specialize=["num_rows", "scale"])
def bidirectional_output_kernel(
    Q,
    P,
    KEY_VALUE,
    KEY_SUM,
    OUT,
    SPANS,
    q_item,
    q_head,
    q_row,
    num_rows,
    heads_per_group,
    scale,
    NUM_FEATURES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    first, real = item_span(SPANS, item, num_rows, HAS_PADDING)
    rows, o_value = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, VALUE_PADDED)
    m_row, m_value = rows < num_rows, (o_value < VALUE_DIM)[None, :]
    _, length = row_span(rows, num_rows, num_rows, first, real, False)
    p_q = Q + item * q_item + head.to(tl.int64) * q_head + rows.to(tl.int64) * q_row
    b_q = load_rows(p_q, m_row, HEAD_DIM, HEAD_PADDED)
    half_norm = half_norms(b_q, HEAD_DIM)[:, None]
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, NUM_FEATURES, TILE):
        o_feature = begin + tl.arange(0, TILE)
        projected = project(b_q, P, o_feature, scale, NUM_FEATURES, HEAD_DIM, HEAD_PADDED, PRECISION)
        highest = tl.maximum(
            highest, tl.max(tl.where((o_feature < NUM_FEATURES)[None, :], projected, float("-inf")), 1)
        )
    acc = tl.zeros([BLOCK, VALUE_PADDED], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    state = (item * (heads // heads_per_group) + head // heads_per_group) * NUM_FEATURES
    for begin in range(0, NUM_FEATURES, TILE):
        o_feature = begin + tl.arange(0, TILE)
        m_feature = o_feature < NUM_FEATURES
        projected = project(b_q, P, o_feature, scale, NUM_FEATURES, HEAD_DIM, HEAD_PADDED, PRECISION)
        b_fq = exp_features(projected, half_norm, highest[:, None], m_feature[None, :], PRECISION)  # [BLOCK, TILE]
        p_state = KEY_VALUE + (state + o_feature)[:, None] * VALUE_DIM + o_value[None, :]
        b_state = rounded(tl.load(p_state, mask=m_feature[:, None] & m_value, other=0.0), PRECISION)  # [TILE, VALUE]
        acc = tl.dot(b_fq, b_state, acc, input_precision=PRECISION)
        total += tl.sum(b_fq * tl.load(KEY_SUM + state + o_feature, mask=m_feature, other=0.0)[None, :], 1)
    out = tl.where((length > 0)[:, None], acc / tl.where(length > 0, total, 1.0)[:, None], 0.0)
    p_out = OUT + ((item * heads + head) * num_rows + rows)[:, None] * VALUE_DIM + o_value[None, :]
    tl.store(p_out, out.to(OUT.dtype.element_ty), mask=m_row[:, None] & m_value)
