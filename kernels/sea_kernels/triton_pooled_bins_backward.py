"""Gradient to queries from the pooled bins that their rows do not keep: what a sum over kept keys begins with.

All rows of a head share the bins of a width, so that no list says which of them a block of rows needs.
"""

import triton
import triton.language as tl

from .triton_pooled_bins import left_out, load_bins
from .triton_wide_lists import rows_of_level


@triton.jit
def add_pooled_bins(
    b_q,
    b_do,
    BIN_K,
    BIN_V,
    BIN_OFFSET,
    p_words,
    seeing,
    length,
    level,
    log_sum,
    delta,
    acc,
    scaling,
    FIRST_LEVEL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc`` plus every row's sum of p (grad_output . v - delta) k over the bins of its width that it does not keep.

    BIN_K, BIN_V, BIN_OFFSET: of the head, bins of all widths.
    p_words: each row's first word of bits; it is loaded where ``seeing``, the rows with keys, says so.
    FIRST_LEVEL: rows whose bins are narrower get nothing.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    WORDS: tl.constexpr = NUM_BINS // 32
    o_tile = tl.arange(0, 32)
    low, high = tl.maximum(tl.min(tl.where(seeing, level, 31)), FIRST_LEVEL), tl.max(level)
    most = (tl.max(length) + (1 << high) - 1) >> high
    BIN_K += low * (NUM_BINS * HEAD_DIM)
    BIN_V += low * (NUM_BINS * VALUE_DIM)
    BIN_OFFSET += low * NUM_BINS
    kept = tl.load(p_words, mask=seeing, other=0)
    # One loop takes the words of all widths of the block, which are mostly one: products of wide rows wait for each
    # other in a loop within another. Two stages take fewer registers than three.
    for step in tl.range(0, (high - low) * WORDS + (most + 31) // 32, num_stages=2):
        current, word = low + step // WORDS, step % WORDS
        # Bins with keys of the rows of this width. Not by their level, whose loop no layout of the words gets past.
        own = tl.where(rows_of_level(length, current, NUM_BINS), (length + (1 << current) - 1) >> current, 0)
        far = (left_out(kept, word * 32, own)[:, None] & (1 << o_tile)[None, :]) == 0
        kept = tl.load(p_words + (step + 1) % WORDS, mask=seeing, other=0)  # a step early, so that none waits for it
        bin_ = step * 32 + o_tile
        b_k = load_bins(BIN_K, bin_, HEAD_DIM, HEAD_PADDED)
        b_v = load_bins(BIN_V, bin_, VALUE_DIM, VALUE_PADDED)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scaling + tl.load(BIN_OFFSET + bin_)[None, :]
        weights = tl.exp2(tl.where(far, scores * LOG2E - log_sum[:, None], float("-inf")))
        grad_weights = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None])
        acc += tl.dot(grad_scores.to(b_k.dtype), b_k, input_precision=PRECISION)
    return acc
