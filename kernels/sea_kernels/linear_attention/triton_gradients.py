"""Kernels of the causal backward pass.

With ``g_t = grad_t / normaliser_t`` and ``e_t = -(grad_t . out_t) / normaliser_t``, the weight of key j in row t has
the gradient ``g_t . v_j + e_t``. Features of queries collect it from the keys before, through the states of the forward
pass; features and values of keys from the rows after, through sums of phi(q) g^T and phi(q) e that begin at the end.
"""

import triton
import triton.language as tl

from ..triton_common import item_span, row_span
from .triton_features import load_directions, load_rows, relu_features, rounded


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def row_kernel(
    GRAD,
    OUT,
    NORMALISER,
    INVERSE,
    DELTA,
    SPANS,
    g_item,
    g_head,
    g_row,
    num_queries,
    num_keys,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    """What a row's gradient is multiplied with to give g, and e; zeros in padding rows."""
    head, item = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, length = row_span(rows, num_queries, num_keys, first, real, True)
    m_row = length > 0
    place = (item * tl.num_programs(1) + head) * num_queries + rows
    p_grad = GRAD + item * g_item + head.to(tl.int64) * g_head + rows.to(tl.int64) * g_row
    b_grad = load_rows(p_grad, m_row, VALUE_DIM, VALUE_PADDED)
    b_out = load_rows(OUT + place * VALUE_DIM, m_row, VALUE_DIM, VALUE_PADDED)
    inverse = tl.where(m_row, 1.0 / tl.load(NORMALISER + place, mask=m_row, other=1.0), 0.0)
    tl.store(INVERSE + place, inverse, mask=rows < num_queries)
    tl.store(DELTA + place, -tl.sum(b_grad * b_out, 1) * inverse, mask=rows < num_queries)


@triton.jit
def _load_gradient(
    p_grad,
    g_row,
    INVERSE,
    DELTA,
    place,
    rows,
    m_row,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """g ``[BLOCK, VALUE]`` and e ``[BLOCK]`` of the rows of one head. p_grad, place: of the head's first row."""
    inverse = tl.load(INVERSE + place + rows, mask=m_row, other=0.0)
    b_grad = load_rows(p_grad + rows.to(tl.int64) * g_row, m_row & (inverse > 0), VALUE_DIM, VALUE_PADDED)
    return rounded(b_grad * inverse[:, None], PRECISION), tl.load(DELTA + place + rows, mask=m_row, other=0.0)


@triton.jit(
    do_not_specialize=["num_queries", "num_keys", "heads_per_group", "first_segment", "segments", "q_scale"],
)
def gradient_state_kernel(
    Q,
    P,
    GRAD,
    INVERSE,
    DELTA,
    STATE,
    STATE_SUM,
    q_item,
    q_head,
    q_row,
    g_item,
    g_head,
    g_row,
    num_queries,
    num_keys,
    heads_per_group,
    first_segment,
    segments,
    q_scale,
    NUM_FEATURES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of phi(q) g^T and phi(q) e over the rows of one segment and the heads of a group, for a tile of features."""
    segment, group, item = tl.program_id(0) % segments, tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) * heads_per_group
    o_feature, o_value = tl.program_id(0) // segments * TILE + tl.arange(0, TILE), tl.arange(0, VALUE_PADDED)
    m_feature, m_value = o_feature < NUM_FEATURES, (o_value < VALUE_DIM)[None, :]
    b_p = load_directions(P, o_feature, NUM_FEATURES, HEAD_DIM, HEAD_PADDED, PRECISION)  # [TILE, HEAD]
    BLOCKS: tl.constexpr = SEGMENT // BLOCK
    state = tl.zeros([TILE, VALUE_PADDED], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for step in range(0, heads_per_group * BLOCKS):
        head = group * heads_per_group + step // BLOCKS
        rows = (first_segment + segment) * SEGMENT + step % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        rows -= num_keys - num_queries
        m_row = (rows >= 0) & (rows < num_queries)
        p_q = Q + item * q_item + head.to(tl.int64) * q_head + rows.to(tl.int64) * q_row
        b_q = load_rows(p_q, m_row, HEAD_DIM, HEAD_PADDED)
        p_grad = GRAD + item * g_item + head.to(tl.int64) * g_head
        place = (item * heads + head) * num_queries
        b_g, b_e = _load_gradient(p_grad, g_row, INVERSE, DELTA, place, rows, m_row, VALUE_DIM, VALUE_PADDED, PRECISION)
        projected = tl.dot(b_p, tl.trans(b_q), input_precision=PRECISION) * q_scale  # [TILE, BLOCK]
        features = relu_features(projected, m_feature[:, None] & m_row[None, :], PRECISION)
        state = tl.dot(features, b_g, state, input_precision=PRECISION)
        total += tl.sum(features * b_e[None, :], 1)
    place = ((item * tl.num_programs(1) + group) * segments + segment) * NUM_FEATURES + o_feature
    tl.store(STATE + place[:, None] * VALUE_DIM + o_value[None, :], state, mask=m_feature[:, None] & m_value)
    tl.store(STATE_SUM + place, total, mask=m_feature)


@triton.jit(
    do_not_specialize=[
        "num_queries",
        "num_keys",
        "heads_per_group",
        "first_block",
        "first_segment",
        "segments",
        "q_scale",
        "k_scale",
    ]
)
def query_gradient_kernel(
    Q,
    K,
    V,
    P,
    GRAD,
    INVERSE,
    DELTA,
    KEY_VALUE,
    KEY_SUM,
    GRAD_Q,
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
    g_item,
    g_head,
    g_row,
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
    o_place, o_dim = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HEAD_PADDED)
    rows = o_place - (num_keys - num_queries)
    m_row = (rows >= 0) & (rows < num_queries)
    p_q = Q + item * q_item + head.to(tl.int64) * q_head + rows.to(tl.int64) * q_row
    b_q = load_rows(p_q, m_row, HEAD_DIM, HEAD_PADDED)
    p_grad = GRAD + item * g_item + head.to(tl.int64) * g_head
    place = (item * heads + head) * num_queries
    b_g, b_e = _load_gradient(p_grad, g_row, INVERSE, DELTA, place, rows, m_row, VALUE_DIM, VALUE_PADDED, PRECISION)
    K += item * k_item + group.to(tl.int64) * k_head
    V += item * v_item + group.to(tl.int64) * v_head
    grad = tl.zeros([BLOCK, HEAD_PADDED], tl.float32)
    for other in range(block // BLOCKS * BLOCKS, block + 1):
        o_key = other * BLOCK + tl.arange(0, BLOCK)
        m_key = (o_key >= first) & (o_key < first + real)
        b_k = load_rows(K + o_key.to(tl.int64) * k_row, m_key, HEAD_DIM, HEAD_PADDED)
        b_v = load_rows(V + o_key.to(tl.int64) * v_row, m_key, VALUE_DIM, VALUE_PADDED)
        weights = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION) + b_e[:, None]  # gradient of the weights
        weights = tl.where(m_key[None, :] & (o_key[None, :] <= o_place[:, None]), weights, 0.0)
        weights = rounded(weights, PRECISION)
        for begin in range(0, NUM_FEATURES, TILE):
            o_feature = begin + tl.arange(0, TILE)
            b_p = load_directions(P, o_feature, NUM_FEATURES, HEAD_DIM, HEAD_PADDED, PRECISION)
            projected = tl.dot(b_k, tl.trans(b_p), input_precision=PRECISION) * k_scale
            b_fk = relu_features(projected, (o_feature < NUM_FEATURES)[None, :], PRECISION)
            projected = tl.dot(b_q, tl.trans(b_p), input_precision=PRECISION)  # only its sign counts
            features = tl.dot(weights, b_fk, input_precision=PRECISION)
            features = rounded(tl.where(projected * q_scale > 0, features, 0.0), PRECISION)
            grad = tl.dot(features, b_p, grad, input_precision=PRECISION)
    state = ((item * (heads // heads_per_group) + group) * segments + block // BLOCKS - first_segment) * NUM_FEATURES
    for begin in range(0, NUM_FEATURES, TILE):
        o_feature = begin + tl.arange(0, TILE)
        m_feature = o_feature < NUM_FEATURES
        b_p = load_directions(P, o_feature, NUM_FEATURES, HEAD_DIM, HEAD_PADDED, PRECISION)
        b_state = load_rows(KEY_VALUE + (state + o_feature) * VALUE_DIM, m_feature, VALUE_DIM, VALUE_PADDED)
        b_state = rounded(b_state, PRECISION)
        b_sum = tl.load(KEY_SUM + state + o_feature, mask=m_feature, other=0.0) + SUM_EPSILON
        projected = tl.dot(b_q, tl.trans(b_p), input_precision=PRECISION)
        features = tl.dot(b_g, tl.trans(b_state), input_precision=PRECISION) + b_e[:, None] * b_sum[None, :]
        features = rounded(tl.where(projected * q_scale > 0, features, 0.0), PRECISION)
        grad = tl.dot(features, b_p, grad, input_precision=PRECISION)
    p_out = GRAD_Q + (place + rows)[:, None] * HEAD_DIM + o_dim[None, :]
    grad = (grad * q_scale).to(GRAD_Q.dtype.element_ty)
    tl.store(p_out, grad, mask=m_row[:, None] & (o_dim < HEAD_DIM)[None, :])


@triton.jit(
    do_not_specialize=[
        "num_queries",
        "num_keys",
        "heads_per_group",
        "first_segment",
        "segments",
        "q_scale",
        "k_scale",
    ]
)
def key_gradient_kernel(
    Q,
    K,
    V,
    P,
    GRAD,
    INVERSE,
    DELTA,
    STATE,
    STATE_SUM,
    GRAD_K,
    GRAD_V,
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
    g_item,
    g_head,
    g_row,
    num_queries,
    num_keys,
    heads_per_group,
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
    BLOCKS: tl.constexpr = SEGMENT // BLOCK
    block, group, item = first_segment * BLOCKS + tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(1)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    o_key, o_dim, o_value = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HEAD_PADDED), tl.arange(0, VALUE_PADDED)
    m_key = (o_key >= first) & (o_key < first + real)
    p_k = K + item * k_item + group.to(tl.int64) * k_head + o_key.to(tl.int64) * k_row
    b_k = load_rows(p_k, m_key, HEAD_DIM, HEAD_PADDED)
    p_v = V + item * v_item + group.to(tl.int64) * v_head + o_key.to(tl.int64) * v_row
    b_v = load_rows(p_v, m_key, VALUE_DIM, VALUE_PADDED)
    grad_k = tl.zeros([BLOCK, HEAD_PADDED], tl.float32)
    grad_v = tl.zeros([BLOCK, VALUE_PADDED], tl.float32)
    # Blocks of rows of this segment that see these keys.
    left = tl.minimum(BLOCKS - block % BLOCKS, (num_keys + BLOCK - 1) // BLOCK - block)
    for step in range(0, heads_per_group * left):
        head = group * heads_per_group + step // left
        o_place = (block + step % left) * BLOCK + tl.arange(0, BLOCK)
        rows = o_place - (num_keys - num_queries)
        m_row = (rows >= 0) & (rows < num_queries)
        p_q = Q + item * q_item + head.to(tl.int64) * q_head + rows.to(tl.int64) * q_row
        b_q = load_rows(p_q, m_row, HEAD_DIM, HEAD_PADDED)
        p_grad = GRAD + item * g_item + head.to(tl.int64) * g_head
        place = (item * groups * heads_per_group + head) * num_queries
        b_g, b_e = _load_gradient(p_grad, g_row, INVERSE, DELTA, place, rows, m_row, VALUE_DIM, VALUE_PADDED, PRECISION)
        sees = m_key[:, None] & m_row[None, :] & (o_key[:, None] <= o_place[None, :])  # [keys, rows]
        change = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION) + b_e[None, :]  # gradient of the weights
        change = rounded(tl.where(sees, change, 0.0), PRECISION)
        weights = tl.zeros([BLOCK, BLOCK], tl.float32)
        for begin in range(0, NUM_FEATURES, TILE):
            o_feature = begin + tl.arange(0, TILE)
            m_feature = (o_feature < NUM_FEATURES)[None, :]
            b_p = load_directions(P, o_feature, NUM_FEATURES, HEAD_DIM, HEAD_PADDED, PRECISION)
            projected = tl.dot(b_q, tl.trans(b_p), input_precision=PRECISION) * q_scale
            b_fq = relu_features(projected, m_feature, PRECISION)
            projected = tl.dot(b_k, tl.trans(b_p), input_precision=PRECISION) * k_scale
            b_fk = relu_features(projected, m_feature, PRECISION)
            weights = tl.dot(b_fk, tl.trans(b_fq), weights, input_precision=PRECISION)
            features = tl.dot(change, b_fq, input_precision=PRECISION)
            features = rounded(tl.where(projected > 0, features, 0.0), PRECISION)
            grad_k = tl.dot(features, b_p, grad_k, input_precision=PRECISION)
        weights = rounded(tl.where(sees, weights, 0.0), PRECISION)
        grad_v = tl.dot(weights, b_g, grad_v, input_precision=PRECISION)
    state = ((item * groups + group) * segments + block // BLOCKS - first_segment) * NUM_FEATURES
    for begin in range(0, NUM_FEATURES, TILE):
        o_feature = begin + tl.arange(0, TILE)
        m_feature = o_feature < NUM_FEATURES
        b_p = load_directions(P, o_feature, NUM_FEATURES, HEAD_DIM, HEAD_PADDED, PRECISION)
        b_state = load_rows(STATE + (state + o_feature) * VALUE_DIM, m_feature, VALUE_DIM, VALUE_PADDED)
        b_state = rounded(b_state, PRECISION)
        b_sum = tl.load(STATE_SUM + state + o_feature, mask=m_feature, other=0.0)
        projected = tl.dot(b_k, tl.trans(b_p), input_precision=PRECISION) * k_scale
        b_fk = relu_features(projected, m_feature[None, :], PRECISION)
        grad_v = tl.dot(b_fk, b_state, grad_v, input_precision=PRECISION)
        features = tl.dot(b_v, tl.trans(b_state), input_precision=PRECISION) + b_sum[None, :]
        features = rounded(tl.where(projected > 0, features, 0.0), PRECISION)
        grad_k = tl.dot(features, b_p, grad_k, input_precision=PRECISION)
    place = (item * groups + group) * num_keys + o_key
    grad_k = tl.where(m_key[:, None], grad_k * k_scale, 0.0).to(GRAD_K.dtype.element_ty)
    grad_v = tl.where(m_key[:, None], grad_v, 0.0).to(GRAD_V.dtype.element_ty)
    m_out = (o_key < num_keys)[:, None]
    tl.store(GRAD_K + place[:, None] * HEAD_DIM + o_dim[None, :], grad_k, mask=m_out & (o_dim < HEAD_DIM)[None, :])
    tl.store(
        GRAD_V + place[:, None] * VALUE_DIM + o_value[None, :], grad_v, mask=m_out & (o_value < VALUE_DIM)[None, :]
    )
