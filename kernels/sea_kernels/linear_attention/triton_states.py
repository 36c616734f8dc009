"""Kernels that read keys: their highest projection, sums of phi(k) v^T over segments, the running sum of those."""

import triton
import triton.language as tl

from ..triton_common import item_span
from .triton_features import exp_features, half_norms, load_directions, load_rows, project, relu_features


@triton.jit(do_not_specialize=["num_keys", "scale"])
def highest_kernel(
    K,
    P,
    HIGHEST,
    SPANS,
    k_item,
    k_head,
    k_row,
    num_keys,
    scale,
    NUM_FEATURES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Highest projection of a block of real keys over all features; very low where no key is real."""
    block, group, item = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    o_key = block * BLOCK + tl.arange(0, BLOCK)
    m_key = (o_key >= first) & (o_key < first + real)
    p_k = K + item * k_item + group.to(tl.int64) * k_head + o_key.to(tl.int64) * k_row
    b_k = load_rows(p_k, m_key, HEAD_DIM, HEAD_PADDED)
    highest = tl.full([BLOCK], -1e30, tl.float32)
    for begin in range(0, NUM_FEATURES, TILE):
        o_feature = begin + tl.arange(0, TILE)
        projected = project(b_k, P, o_feature, scale, NUM_FEATURES, HEAD_DIM, HEAD_PADDED, PRECISION)
        mask = m_key[:, None] & (o_feature < NUM_FEATURES)[None, :]
        highest = tl.maximum(highest, tl.max(tl.where(mask, projected, -1e30), 1))
    place = (item * tl.num_programs(1) + group) * tl.num_programs(0) + block
    tl.store(HIGHEST + place, tl.max(highest, 0))


@triton.jit(do_not_specialize=["num_keys", "first_segment", "segments", "blocks", "scale"])
def state_kernel(
    K,
    V,
    P,
    HIGHEST,
    KEY_VALUE,
    KEY_SUM,
    SPANS,
    k_item,
    k_head,
    k_row,
    v_item,
    v_head,
    v_row,
    num_keys,
    first_segment,
    segments,
    blocks,
    scale,
    NUM_FEATURES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over one segment of ``blocks`` blocks of keys, for one tile of features."""
    segment, group, item = tl.program_id(0) % segments, tl.program_id(1), tl.program_id(2).to(tl.int64)
    item_group = item * tl.num_programs(1) + group
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    o_feature, o_value = tl.program_id(0) // segments * TILE + tl.arange(0, TILE), tl.arange(0, VALUE_PADDED)
    m_feature, m_value = o_feature < NUM_FEATURES, (o_value < VALUE_DIM)[None, :]
    K += item * k_item + group.to(tl.int64) * k_head
    V += item * v_item + group.to(tl.int64) * v_head
    b_p = load_directions(P, o_feature, NUM_FEATURES, HEAD_DIM, HEAD_PADDED, PRECISION)  # [TILE, HEAD]
    if EXPONENTIAL:
        highest = tl.load(HIGHEST + item_group)
    key_value = tl.zeros([TILE, VALUE_PADDED], tl.float32)
    key_sum = tl.zeros([TILE], tl.float32)
    for step in range(0, blocks):
        o_key = ((first_segment + segment) * blocks + step) * BLOCK + tl.arange(0, BLOCK)
        m_key = (o_key >= first) & (o_key < first + real)
        b_k = load_rows(K + o_key.to(tl.int64) * k_row, m_key, HEAD_DIM, HEAD_PADDED)
        p_v = V + o_key.to(tl.int64)[:, None] * v_row + o_value[None, :]
        b_v = tl.load(p_v, mask=m_key[:, None] & m_value, other=0.0).to(tl.float32)  # [BLOCK, VALUE]
        projected = tl.dot(b_p, tl.trans(b_k), input_precision=PRECISION) * scale  # [TILE, BLOCK]
        mask = m_feature[:, None] & m_key[None, :]
        if EXPONENTIAL:
            features = exp_features(projected, half_norms(b_k, HEAD_DIM)[None, :], highest, mask, PRECISION)
        else:
            features = relu_features(projected, mask, PRECISION)
        key_value = tl.dot(features, b_v, key_value, input_precision=PRECISION)
        key_sum += tl.sum(features, 1)
    place = (item_group * segments + segment) * NUM_FEATURES + o_feature
    p_out = KEY_VALUE + place.to(tl.int64)[:, None] * VALUE_DIM + o_value[None, :]
    tl.store(p_out, key_value, mask=m_feature[:, None] & m_value)
    tl.store(KEY_SUM + place, key_sum, mask=m_feature)


@triton.jit(do_not_specialize=["segments", "size"])
def scan_kernel(
    SUMS,
    INITIAL,
    FINAL,
    segments,
    size,
    TILE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Replace each segment's sum by the initial state and the sums before it; the whole sum goes to ``FINAL``.

    REVERSE goes from the last segment to the first.
    """
    place = tl.program_id(1).to(tl.int64)
    o_element = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = o_element < size
    total = tl.zeros([TILE], tl.float32)
    if HAS_INITIAL:
        total += tl.load(INITIAL + place * size + o_element, mask=mask, other=0.0)
    SUMS += place * segments * size
    for step in range(0, segments):
        segment = segments - 1 - step if REVERSE else step
        p_sum = SUMS + segment * size + o_element
        part = tl.load(p_sum, mask=mask, other=0.0)
        tl.store(p_sum, total, mask=mask)
        total += part
    tl.store(FINAL + place * size + o_element, total, mask=mask)
