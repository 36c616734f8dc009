"""Attention of a block of rows to the pooled bins that they do not keep, for the Triton forms of the far field.

With it begins a softmax that the calling kernel, or a later one, goes on with.
"""

import triton
import triton.language as tl

from .triton_wide_lists import rows_of_level


@triton.jit
def take_pooled_bins(
    b_q,
    BIN_K,
    BIN_V,
    BIN_OFFSET,
    item_head,
    num_levels,
    scaling,
    p_words,
    seeing,
    length,
    level,
    FIRST_LEVEL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Running softmax over the bins of the rows' own widths that they do not keep, beginning with nothing.

    Returns the highest scores [ROWS] in units of log 2, about -1e30 in rows without bins, the sums of exponentials
    [ROWS], and the values weighted with these [ROWS, VALUE].

    p_words: first words of the rows' bits, which say what they keep.
    seeing: which rows have keys.
    FIRST_LEVEL: log2 of the keys of the smallest bins to take; rows of smaller ones have none.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    HALVES: tl.constexpr = TILE // 32
    STAGES: tl.constexpr = 2 if TILE > 32 else 3  # also where the calling kernel's other loops have more
    ROWS: tl.constexpr = b_q.shape[0]
    o_tile = tl.arange(0, TILE)
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    low = tl.maximum(tl.min(tl.where(seeing, level, 31)), FIRST_LEVEL)
    # Counts from 0, since Triton finds no wide loads where the first step is a reduction's result.
    for index in range(0, tl.max(level) + 1 - low):
        current = low + index
        # Bins with keys of the rows of this width. Not by their level, whose loop no layout of the words gets past.
        own = tl.where(rows_of_level(length, current, NUM_BINS), (length + (1 << current) - 1) >> current, 0)
        place = item_head * num_levels + current
        p_k, p_v = BIN_K + place * (NUM_BINS * HEAD_DIM), BIN_V + place * (NUM_BINS * VALUE_DIM)
        p_offset = BIN_OFFSET + place * NUM_BINS
        left, right = tl.load(p_words, mask=seeing, other=0), tl.load(p_words + HALVES - 1, mask=seeing, other=0)
        tiles = (tl.max(own) + TILE - 1) // TILE
        for step in tl.range(0, tiles, num_stages=STAGES):
            bin_ = step * TILE + o_tile
            b_k = load_bins(p_k, bin_, HEAD_DIM, HEAD_PADDED)  # [TILE, HEAD]
            b_v = load_bins(p_v, bin_, VALUE_DIM, VALUE_PADDED)  # [TILE, VALUE]
            scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scaling + tl.load(p_offset + bin_)[None, :]
            left, right = left_out(left, step * TILE, own), left_out(right, (step + 1) * TILE - 32, own)
            far = tl.where((o_tile < 32)[None, :], left[:, None], right[:, None]) & (1 << (o_tile & 31))[None, :]
            # Words come a step early, so that no step waits for them.
            p_next = p_words + tl.minimum(step + 1, tiles - 1) * HALVES
            left, right = tl.load(p_next, mask=seeing, other=0), tl.load(p_next + HALVES - 1, mask=seeing, other=0)
            scores = tl.where(far == 0, scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores * LOG2E - (new_highest * LOG2E)[:, None])
            rescale = tl.exp2((highest - new_highest) * LOG2E)
            total = total * rescale + tl.sum(weights, 1)
            acc = acc * rescale[:, None] + tl.dot(weights.to(b_v.dtype), b_v, input_precision=PRECISION)
            highest = new_highest
    return highest * LOG2E, total, acc


@triton.jit
def load_bins(BASE, bin_, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a head's pooled keys or values. [TILE, PADDED]"""
    o_dim = tl.arange(0, PADDED)
    pointer = BASE + bin_[:, None] * DIM + o_dim[None, :]  # in 32 bits, which spill fewer registers than parts in 64
    return tl.load(pointer) if DIM == PADDED else tl.load(pointer, mask=(o_dim < DIM)[None, :], other=0.0)


@triton.jit
def left_out(word, first, own):
    """Bits of the bins from ``first`` on that are kept, or that are not among the ``own`` bins of a row. [ROWS]"""
    there = own - first
    return word | tl.where(there < 32, -1 << tl.minimum(tl.maximum(there, 0), 31), 0)
