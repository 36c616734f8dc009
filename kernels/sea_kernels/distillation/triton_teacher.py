"""Triton form of the teacher's statistics: log-sum-exps first, then one walk along the keys that pools their mass.

The first of the two walks is left out where the teacher's own attention has computed the log-sum-exps already.

A tile's mass is summed along its keys; the mass of a bin is a difference of two such sums, plus what earlier tiles held
of the bin. The row stores it at the bin's last key, so every bin is written once and no program adds to another's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bins import Layout
from ..triton_common import (
    aligned_level,
    cdiv,
    count_levels,
    item_span,
    item_spans,
    on_device,
    row_span,
    with_dense_rows,
)
from .triton_scores import (
    LOG2E,
    last_block_first,
    load_rows,
    padded_width,
    product_precision,
    row_lse,
    tile_config,
)


@torch.no_grad()
def teacher_statistics(
    query: Tensor,
    key: Tensor,
    *,
    num_bins: int,
    layout: Layout,
    causal: bool,
    scaling: float,
    attention_mask: Tensor | None,
    shift: int,
    log_sum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sea_kernels.teacher_statistics`."""
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    query, key, spans = with_dense_rows(query), with_dense_rows(key), item_spans(attention_mask)
    lse = (
        row_lse(query, key, spans, causal=causal, scaling=scaling) if log_sum is None else log_sum.float().contiguous()
    )
    mass = query.new_zeros(batch, heads, num_queries, num_bins, dtype=torch.float32)  # bins without keys stay 0
    entropy, square = torch.empty_like(lse), torch.empty_like(lse)
    config = tile_config(query)
    config["KEYS"] = min(config["KEYS"], 32)  # a larger tile's sums and edges do not fit into registers
    with on_device(query):
        _pool_kernel[(cdiv(num_queries, config["ROWS"]), heads, batch)](
            query,
            key,
            lse,
            mass,
            entropy,
            square,
            spans,
            *query.stride()[:3],
            *key.stride()[:3],
            heads // key.shape[1],
            num_queries,
            num_keys,
            count_levels(num_keys, num_bins),
            shift,
            scaling * LOG2E,
            HEAD_DIM=head_dim,
            HEAD_PADDED=padded_width(query),
            NUM_BINS=num_bins,
            CAUSAL=causal,
            HAS_PADDING=spans is not None,
            RELATIVE=layout == "relative",
            HAS_SHIFT=shift != 0,
            PRECISION=product_precision(query),
            **config,
        )
    return mass, entropy, square


@triton.jit
def _relative_start(index, length, shift, NUM_BINS: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """``triton_entries.relative_start`` in 32 bits, for ``length * NUM_BINS < 2^31``."""
    whole = length * index // NUM_BINS
    rest = length * index - whole * NUM_BINS
    if HAS_SHIFT:
        part = 512 * rest + NUM_BINS * (256 + 2 * (shift & 255))
        inner = whole + (shift >> 8) + part // (512 * NUM_BINS)
    else:
        inner = whole + (2 * rest + NUM_BINS) // (2 * NUM_BINS)
    inner = tl.minimum(tl.maximum(inner, 0), length)
    return tl.where(index <= 0, 0, tl.where(index >= NUM_BINS, length, inner))


@triton.jit
def _relative_bin(place, length, shift, NUM_BINS: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """Bin of key ``place``, as ``bins.bin_of`` has it, for places below ``length`` and ``length < 2^21``.

    A quotient of floats misses the bin by one at most. The remainder, which is small, tells: it is right also where
    the products that it is the difference of do not fit into 32 bits.
    """
    middle = (2 * place + 1).to(tl.float32)
    if HAS_SHIFT:
        middle -= shift / 128
        numerator = NUM_BINS * (256 * (2 * place + 1) - 2 * shift) - 1
        unit = 512 * length
    else:
        numerator = NUM_BINS * (2 * place + 1) - 1
        unit = 2 * length
    bins_per_key = NUM_BINS / tl.maximum(2 * length, 1).to(tl.float32)
    index = tl.minimum(tl.maximum(middle * bins_per_key, 0.0), NUM_BINS - 1.0).to(tl.int32)
    rest = numerator - index * unit
    index += (rest >= unit).to(tl.int32) - (rest < 0).to(tl.int32)
    return tl.minimum(tl.maximum(index, 0), NUM_BINS - 1)


@triton.jit
def bin_of_keys(place, length, level, shift, NUM_BINS: tl.constexpr, RELATIVE: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """The bin of each key, the bin's first key and its end; int32, of the shape that the arguments broadcast to."""
    if RELATIVE:
        index = _relative_bin(place, length, shift, NUM_BINS, HAS_SHIFT)
        start = _relative_start(index, length, shift, NUM_BINS, HAS_SHIFT)
        end = _relative_start(index + 1, length, shift, NUM_BINS, HAS_SHIFT)
    else:
        index = place >> level
        start = index << level
        end = tl.minimum((index + 1) << level, length)
    return index, start, end


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "shift", "scale"])
def _pool_kernel(
    Q,
    K,
    LSE,
    MASS,
    ENTROPY,
    SQUARE,
    SPANS,
    q_item,
    q_head,
    q_row,
    k_item,
    k_head,
    k_row,
    heads_per_group,
    num_queries,
    num_keys,
    num_levels,
    shift,
    scale,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    LN2: tl.constexpr = 0.6931471805599453
    LOG2E: tl.constexpr = 1.4426950408889634
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = last_block_first(num_queries, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    m_row = rows < num_queries
    o_tile = tl.arange(0, KEYS)
    b_q = load_rows(Q + item * q_item + head * q_head, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)  # [ROWS, HEAD]
    K += item * k_item + (head // heads_per_group) * k_head + first.to(tl.int64) * k_row
    place = (item * tl.num_programs(1) + head) * num_queries + rows
    lse = tl.load(LSE + place, mask=m_row, other=0.0) * LOG2E
    p_mass = MASS + place[:, None] * NUM_BINS
    entropy = tl.zeros([ROWS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    open_mass = tl.zeros([ROWS], tl.float32)  # of the bin that the last tile ended in
    for begin in range(0, tl.max(length), KEYS):
        o_key = begin + o_tile
        b_k = load_rows(K, o_key, o_key < real, k_row, HEAD_DIM, HEAD_PADDED)  # [KEYS, HEAD]
        logs = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale - lse[:, None]  # [ROWS, KEYS]
        keep = o_key[None, :] < length[:, None]
        logs = tl.where(keep, logs, 0.0)
        teacher = tl.where(keep, tl.exp2(logs), 0.0)
        entropy += tl.sum(teacher * logs, 1)
        square += tl.sum(teacher * teacher, 1)

        index, start, end = bin_of_keys(
            o_key[None, :], length[:, None], level[:, None], shift, NUM_BINS, RELATIVE, HAS_SHIFT
        )
        upto = tl.cumsum(teacher, 1)
        before = tl.gather(upto, tl.maximum(start - begin - 1, 0), 1)
        mass = tl.maximum(upto - tl.where(start > begin, before, 0.0), 0.0)
        mass += tl.where(start < begin, open_mass[:, None], 0.0)
        tl.store(p_mass + index, mass, mask=keep & (o_key[None, :] + 1 == end))
        open_mass = tl.sum(tl.where(o_tile[None, :] == KEYS - 1, mass, 0.0), 1)
    tl.store(ENTROPY + place, entropy * LN2, mask=m_row)
    tl.store(SQUARE + place, square, mask=m_row)
