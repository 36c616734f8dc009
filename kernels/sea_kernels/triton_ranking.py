"""The largest scores of every row, found in registers: no sort, no list of candidates."""

import triton
import triton.language as tl


@triton.jit
def threshold(values, lowest, count, budget):
    """Bounds between which the ``budget``-th largest of each row's ``count`` candidates lies.

    A bisection that stops as soon as exactly ``budget`` values lie above. Where that cannot happen, because equal
    scores (or scores without a float between them) straddle the budget, ``left`` says how many of those in
    ``(below, above]`` are still to be kept.

    values: [ROWS, SIZE], -inf where there is no candidate; lowest: [ROWS], no candidate lies below.
    Returns below, above, left: [ROWS]; keep the values above ``above``, and ``left`` of those between.
    """
    every = budget >= count
    highest = tl.max(values, 1)
    above = tl.where(every, float("-inf"), highest)
    below = lowest - tl.abs(lowest) * 0.001 - 1e-30
    searching = (budget > 0) & (every == 0)
    wanted, most = budget.to(tl.float32), tl.zeros_like(highest)  # most: values above ``above``
    while tl.max(searching.to(tl.int32)) > 0:
        for _ in tl.static_range(2):
            middle = 0.5 * below + 0.5 * above
            found = tl.sum(tl.where(values > middle[:, None], 1.0, 0.0), 1)
            searching = searching & (middle > below) & (middle < above)
            most = tl.where(searching & (found <= wanted), found, most)
            above = tl.where(searching & (found <= wanted), middle, above)
            below = tl.where(searching & (found > wanted), middle, below)
            searching = searching & (found != wanted)
    return below, above, tl.where(every, 0.0, wanted - most)


@triton.jit
def tie_cut(tied, left, SIZE: tl.constexpr):
    """For each row the index up to which ``left`` of its ``tied [ROWS, SIZE]`` values lie; -1 where left is 0."""
    index = tl.arange(0, SIZE)
    short, enough = (left * 0).to(tl.int32) - 1, tl.where(left > 0, SIZE - 1, -1)
    steps: tl.constexpr = 14
    for _ in range(0, steps):
        middle = (short + enough + 1) // 2
        reached = tl.sum(tl.where(tied & (index[None, :] <= middle[:, None]), 1.0, 0.0), 1) >= left
        reached = reached | (middle >= enough)
        enough = tl.where(reached, tl.minimum(middle, enough), enough)
        short = tl.where(reached, short, middle)
    return enough


@triton.jit
def pack(keep, SIZE: tl.constexpr):
    """``keep [ROWS, SIZE]`` (bool) to 16 bits in each of ``[ROWS, max(16, SIZE / 16)]``, by a matrix product."""
    HALVES: tl.constexpr = 16 if SIZE < 256 else SIZE // 16
    o_bin, o_half = tl.arange(0, SIZE)[:, None], tl.arange(0, HALVES)[None, :]
    powers = tl.where((o_bin >> 4) == o_half, 1 << (o_bin & 15), 0).to(tl.float16)  # up to 2^15: exact
    return tl.dot(tl.where(keep, 1.0, 0.0).to(tl.float16), powers).to(tl.int32)


@triton.jit
def pack_largest(values, lowest, count, budget, SIZE: tl.constexpr):
    """The ``budget`` largest of each row's ``count`` candidates as ``pack`` has them, equal ones by lowest index."""
    below, above, left = threshold(values, lowest, count, budget)
    bits = pack(values > above[:, None], SIZE)
    if tl.max(left) > 0:
        tied = (values > below[:, None]) & (values <= above[:, None])
        cut = tie_cut(tied, left, SIZE)
        bits = bits | pack(tied & (tl.arange(0, SIZE)[None, :] <= cut[:, None]), SIZE)
    return bits
