"""Triton form of the selection for groups that lie in one row: a program holds the scores of whole groups in registers.

Scores are compared as integers in the same order, so that the chosen set is exactly the reference's: a bisection over
the integers finds the threshold of every group, a second one over the places says how many of its equals are kept.
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
    next_power_of_2,
    on_device,
    row_span,
    with_dense_rows,
)
from ..triton_ranking import tie_cut

PROGRAM_BINS = 4096  # of small groups that share a program


def select_bins(
    scores: Tensor,
    *,
    k: int,
    causal: bool,
    layout: Layout,
    grouping: str,
    keep_first: bool,
    keep_own: bool,
    num_keys: int,
    attention_mask: Tensor | None,
    shift: int,
) -> Tensor:
    """See :func:`sea_kernels.select_bins`; returns the packed bits."""
    batch, heads, num_queries, num_bins = scores.shape
    spans = item_spans(attention_mask)
    scores = with_dense_rows(scores)
    bits = scores.new_empty(batch, heads, num_queries, num_bins // 32, dtype=torch.int32)
    members = heads if grouping == "causal_batch" else 1
    size = next_power_of_2(members * num_bins)
    rows = max(1, PROGRAM_BINS // size)
    with on_device(scores):
        _select_kernel[(cdiv(num_queries, rows), heads // members, batch)](
            scores.view(torch.int32 if scores.element_size() == 4 else torch.int16),
            bits,
            spans,
            *scores.stride()[:3],
            num_queries,
            num_keys,
            count_levels(num_keys, num_bins),
            k,
            shift,
            HEADS=members,
            NUM_BINS=num_bins,
            SIZE=size,
            ROWS=rows,
            CAUSAL=causal,
            LARGEST=2 ** (8 * scores.element_size() - 1) - 1,
            ALIGNED=layout == "aligned",
            HAS_PADDING=spans is not None,
            KEEP_FIRST=keep_first,
            KEEP_OWN=keep_own,
            num_warps=4 if size <= PROGRAM_BINS else 8,
        )
    return bits


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "k", "shift"])
def _select_kernel(
    SCORES,
    BITS,
    SPANS,
    s_item,
    s_head,
    s_row,
    num_queries,
    num_keys,
    num_levels,
    k,
    shift,
    HEADS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    LARGEST: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    KEEP_FIRST: tl.constexpr,
    KEEP_OWN: tl.constexpr,
):
    head, item = tl.program_id(1) * HEADS, tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    position, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    level = aligned_level(length, num_levels, NUM_BINS)
    if ALIGNED:
        count = tl.where(length > 0, (length + (1 << level) - 1) >> level, 0)
    else:
        count = tl.where(length > 0, NUM_BINS, 0)

    # Which places of a group exist and which of them are decided already.
    o_place = tl.arange(0, SIZE)
    o_head, o_bin = o_place // NUM_BINS, o_place % NUM_BINS
    exists = (o_head < HEADS)[None, :] & (o_bin[None, :] < count[:, None])
    forced = o_place[None, :] < 0
    forced_count = count * 0
    if KEEP_FIRST:
        first_bin = _bin_of(position * 0, length, level, shift, NUM_BINS, ALIGNED)
        forced = forced | (o_bin[None, :] == first_bin[:, None])
        forced_count += (count > 0).to(tl.int32)
    if KEEP_OWN:
        own_bin = _bin_of(position, length, level, shift, NUM_BINS, ALIGNED)
        forced = forced | (o_bin[None, :] == own_bin[:, None])
        forced_count += (count > 0).to(tl.int32)
        if KEEP_FIRST:
            forced_count -= ((count > 0) & (own_bin == first_bin)).to(tl.int32)
    budget = _budget(k, length, level, HEADS, NUM_BINS, ALIGNED)
    least = tl.maximum(HEADS * forced_count, 1)
    budget = tl.minimum(tl.maximum(budget, least), HEADS * count) - HEADS * forced_count

    p_score = SCORES + item * s_item + (head + o_head).to(tl.int64)[None, :] * s_head
    p_score += rows.to(tl.int64)[:, None] * s_row + o_bin[None, :]
    scores = tl.load(p_score, mask=exists, other=0)
    keep = _largest(_ranks(scores, LARGEST), exists & (forced == 0), HEADS * (count - forced_count), budget, SIZE)
    keep = keep | (exists & forced)

    words = tl.reshape(tl.where(keep, 1 << (o_place & 31)[None, :], 0), (ROWS, SIZE // 32, 32))
    WORDS: tl.constexpr = NUM_BINS // 32
    o_word = tl.arange(0, SIZE // 32)
    o_head = head + o_word // WORDS
    p_word = BITS + (item * tl.num_programs(1) * HEADS + o_head)[None, :] * num_queries * WORDS
    p_word += rows[:, None] * WORDS + (o_word % WORDS)[None, :]
    tl.store(p_word, tl.sum(words, 2), mask=(rows < num_queries)[:, None] & (o_word < HEADS * WORDS)[None, :])


@triton.jit
def _bin_of(key, length, level, shift, NUM_BINS: tl.constexpr, ALIGNED: tl.constexpr):
    """Bin of each row's ``key``, as ``bins.bin_of`` has it."""
    if ALIGNED:
        found = key >> level
    else:
        numerator = NUM_BINS * (256 * (2 * key.to(tl.int64) + 1) - 2 * shift) - 1
        found = (numerator // (512 * tl.maximum(length, 1).to(tl.int64))).to(tl.int32)
        found = tl.minimum(tl.maximum(found, 0), NUM_BINS - 1)
    return found


@triton.jit
def _budget(k, length, level, HEADS: tl.constexpr, NUM_BINS: tl.constexpr, ALIGNED: tl.constexpr):
    """Bins that a group wants, as ``bins.wanted_bins`` has it; at most all."""
    if ALIGNED:
        wanted = (length * 0 + 2 * HEADS * k + (1 << level)) >> (level + 1)
    else:
        length = tl.maximum(length, 1).to(tl.int64)
        wanted = (length * 0 + 2 * HEADS * NUM_BINS) * k
        wanted = tl.minimum((wanted + length) // (2 * length), HEADS * NUM_BINS).to(tl.int32)
    return wanted


@triton.jit
def _ranks(scores, LARGEST: tl.constexpr):
    """int32 in the order of the floats whose bits ``scores`` (int16 or int32, up to LARGEST) holds; -0 equals 0."""
    bits = scores.to(tl.int32)
    bits = tl.where(bits == -LARGEST - 1, 0, bits)
    return bits ^ ((bits >> 31) & LARGEST)  # the magnitude of a negative number counts downwards


@triton.jit
def _largest(ranks, candidates, count, budget, SIZE: tl.constexpr):
    """bool ``[ROWS, SIZE]``: the ``budget`` largest of each row's ``count`` candidates, equal ones by lowest place."""
    LARGEST: tl.constexpr = 2147483647
    ranks = tl.where(candidates, ranks, -LARGEST - 1)
    above = tl.max(ranks, 1)
    below = tl.maximum(tl.min(tl.where(candidates, ranks, LARGEST), 1), -LARGEST) - 1
    every = budget >= count
    above = tl.where(every, below, above)
    searching = (budget > 0) & (every == 0)
    while tl.max(searching.to(tl.int32)) > 0:  # more than budget lie above below, at most budget above above
        middle = (below >> 1) + (above >> 1) + (below & above & 1)
        searching = searching & (middle > below)
        found = tl.sum((ranks > middle[:, None]).to(tl.int32), 1)
        above = tl.where(searching & (found <= budget), middle, above)
        below = tl.where(searching & (found > budget), middle, below)
        searching = searching & (found != budget)
    keep = ranks > above[:, None]
    left = tl.where(every, 0, budget - tl.sum(keep.to(tl.int32), 1))
    if tl.max(left) > 0:
        tied = candidates & (ranks == above[:, None])
        cut = tie_cut(tied, left.to(tl.float32), SIZE)
        keep = keep | (tied & (tl.arange(0, SIZE)[None, :] <= cut[:, None]))
    return keep
