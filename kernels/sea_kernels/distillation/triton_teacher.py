"""Triton form of the teacher's statistics: log-sum-exps first, then one walk along the keys that pools their mass.

The first of the two walks is left out where the teacher's own attention has computed the log-sum-exps already.

Aligned bins have the same edges in neighbouring rows: the mass of each is a sum over keys that lie side by side in a
tile, or over whole tiles. Relative bins do not. A tile's mass is summed along its keys; the mass of a bin is a
difference of two such sums, plus what earlier tiles held of the bin. The row stores it at the bin's last key. In both
layouts every bin is written once, and no program adds to another's.
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
    keys_of_all,
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
    if layout == "relative":
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
            TILE_LEVEL=config["KEYS"].bit_length() - 1,
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
def relative_bins(place, length, shift, NUM_BINS: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """The bin of each key, the bin's first key and its end; int32, of the shape that the arguments broadcast to."""
    index = _relative_bin(place, length, shift, NUM_BINS, HAS_SHIFT)
    start = _relative_start(index, length, shift, NUM_BINS, HAS_SHIFT)
    return index, start, _relative_start(index + 1, length, shift, NUM_BINS, HAS_SHIFT)


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
    TILE_LEVEL: tl.constexpr,
):
    LN2: tl.constexpr = 0.6931471805599453
    LOG2E: tl.constexpr = 1.4426950408889634
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = last_block_first(num_queries, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    m_row = rows < num_queries
    b_q = load_rows(Q + item * q_item + head * q_head, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)  # [ROWS, HEAD]
    K += item * k_item + (head // heads_per_group) * k_head + first.to(tl.int64) * k_row
    place = (item * tl.num_programs(1) + head) * num_queries + rows
    lse = tl.load(LSE + place, mask=m_row, other=0.0) * LOG2E
    entropy = tl.zeros([ROWS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    if RELATIVE:
        entropy, square = _pool_relative_bins(
            b_q, K, lse, MASS + place * NUM_BINS, entropy, square, length, real, shift, k_row, scale,
            HEAD_DIM, HEAD_PADDED, NUM_BINS, KEYS, HAS_SHIFT, PRECISION,
        )  # fmt: skip
    else:
        # Rows of one width of bins at a time, which are nearly always all of them.
        low, high = tl.min(tl.where(length > 0, level, 31)), tl.max(tl.where(length > 0, level, 0))
        for own in tl.static_range(TILE_LEVEL + 1):
            last = high if own == TILE_LEVEL else tl.minimum(high, own)
            for current in range(tl.maximum(low, own), last + 1):
                seen = tl.where(level == current, length, 0)
                entropy, square = _pool_aligned_bins(
                    b_q, K, lse, MASS + place * NUM_BINS, entropy, square, seen, real, current, k_row, scale,
                    own, HEAD_DIM, HEAD_PADDED, KEYS, PRECISION,
                )  # fmt: skip
    tl.store(ENTROPY + place, entropy * LN2, mask=m_row)
    tl.store(SQUARE + place, square, mask=m_row)


@triton.jit
def _teacher_tile(
    b_q, K, lse, entropy, square, o_key, real, length, k_row, scale,
    masked: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Probabilities of some keys [ROWS, KEYS], 0 behind the keys that a row sees, and the row's sums with them.

    masked: whether there are such keys.
    """
    b_k = load_rows(K, o_key, o_key < real if masked else None, k_row, HEAD_DIM, HEAD_PADDED)  # [KEYS, HEAD]
    logs = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale - lse[:, None]
    teacher = tl.exp2(logs)
    if masked:
        keep = o_key[None, :] < length[:, None]
        teacher, logs = tl.where(keep, teacher, 0.0), tl.where(keep, logs, 0.0)
    return teacher, entropy + tl.sum(teacher * logs, 1), square + tl.sum(teacher * teacher, 1)


@triton.jit
def _pool_aligned_bins(
    b_q,
    K,
    lse,
    p_mass,
    entropy,
    square,
    length,
    real,
    level,
    k_row,
    scale,
    LEVEL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the masses of rows whose bins have ``2^level`` keys, and add to their entropies and sums of squares.

    length: keys of those rows, 0 of the others.
    LEVEL: level, or log2 of KEYS if level is no less.
    """
    BINS: tl.constexpr = KEYS >> LEVEL  # of a tile
    open_mass = tl.zeros([b_q.shape[0]], tl.float32)  # of a bin of several tiles
    full = keys_of_all(length, KEYS)
    for masked in tl.static_range(2):
        for begin in range(full if masked else 0, tl.max(length) if masked else full, KEYS):
            o_key = begin + tl.arange(0, KEYS)
            teacher, entropy, square = _teacher_tile(
                b_q, K, lse, entropy, square, o_key, real, length, k_row, scale,
                masked, HEAD_DIM, HEAD_PADDED, PRECISION,
            )  # fmt: skip
            if BINS > 1:
                mass = teacher
                if LEVEL > 0:
                    mass = tl.sum(tl.reshape(teacher, (b_q.shape[0], BINS, KEYS // BINS)), 2)
                bin_ = (begin >> LEVEL) + tl.arange(0, BINS)
                stored = (bin_ << LEVEL)[None, :] < length[:, None] if masked else None
                tl.store(p_mass[:, None] + bin_[None, :], mass, mask=stored)
            else:
                open_mass += tl.sum(teacher, 1)
                ends = ((begin + KEYS) & ((1 << level) - 1)) == 0
                stored = (begin < length) & (ends | (length <= begin + KEYS))
                tl.store(p_mass + (begin >> level), open_mass, mask=stored)
                open_mass = tl.where(ends, 0.0, open_mass)
    return entropy, square


@triton.jit
def _pool_relative_bins(
    b_q,
    K,
    lse,
    p_mass,
    entropy,
    square,
    length,
    real,
    shift,
    k_row,
    scale,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store all rows' masses, and add to their entropies and sums of squares."""
    o_tile = tl.arange(0, KEYS)
    open_mass = tl.zeros([b_q.shape[0]], tl.float32)  # of the bin that the last tile ended in
    for begin in range(0, tl.max(length), KEYS):
        o_key = begin + o_tile
        teacher, entropy, square = _teacher_tile(
            b_q, K, lse, entropy, square, o_key, real, length, k_row, scale, True, HEAD_DIM, HEAD_PADDED, PRECISION
        )
        index, start, end = relative_bins(o_key[None, :], length[:, None], shift, NUM_BINS, HAS_SHIFT)
        upto = tl.cumsum(teacher, 1)
        before = tl.gather(upto, tl.maximum(start - begin - 1, 0), 1)
        mass = tl.maximum(upto - tl.where(start > begin, before, 0.0), 0.0)
        mass += tl.where(start < begin, open_mass[:, None], 0.0)
        stored = (o_key[None, :] < length[:, None]) & (o_key[None, :] + 1 == end)
        tl.store(p_mass[:, None] + index, mass, mask=stored)
        open_mass = tl.sum(tl.where(o_tile[None, :] == KEYS - 1, mass, 0.0), 1)
    return entropy, square
