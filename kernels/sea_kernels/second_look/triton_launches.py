"""What the Triton form of the second look launches: classes of heads, and of each the blocks that need as many slots.

A slot holds a candidate of a row in registers, and all programs of a launch have as many slots as the row with the most
candidates can fill. Heads with small budgets would do the work of the largest: they get launches of their own.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ..masks import BinMask, RowBudget
from ..triton_common import cdiv, count_levels, next_power_of_2
from ..triton_entries import BLOCK_ROWS, EntryLists

FEW_BLOCKS = 32  # fewer of them, of all heads, join the next launch: launching costs more than slots they do not need
# Heads that have fewer programs together join those that need more slots: a GPU runs about as many at a time.
FEW_PROGRAMS = 2048
MAX_CLASSES = 4


class Launch(NamedTuple):
    """Consecutive blocks of heads whose rows have few enough candidates.

    Attributes:
        lists: of the entries of the launch's heads.
        order: int32 ``[H]``, all heads, those of the launch side by side; None if the launch has all, as they are.
        first_head: place in ``order`` of the launch's first head.
        first_block: index of the first block.
        num_blocks: how many blocks of each head.
        slots: candidates that a row has at most, a power of two.
    """

    lists: EntryLists
    order: Tensor | None
    first_head: int
    first_block: int
    num_blocks: int
    slots: int


def plan_launches(
    coarse: BinMask, num_keys: int, causal: bool, spans: Tensor | None, *, width: int, stride: int
) -> Iterator[Launch]:
    """The launches that all rows of all heads need.

    Args:
        coarse: what the first look kept.
        num_keys: S.
        causal: whether a row sees only keys up to its own position.
        spans: int32 ``[N, 2]`` of ``triton_common.item_spans``.
        width: keys per run.
        stride: rows that share one estimate.
    """
    batch, heads, num_queries, _ = coarse.bits.shape
    programs = batch * cdiv(num_queries, stride * BLOCK_ROWS)
    first_head = 0
    for part, order in _head_classes(coarse, width, num_keys, programs):
        lists = EntryLists(part, num_keys, causal, spans, unit=width, stride=stride)
        for first, count, slots in _block_ranges(lists, FEW_BLOCKS * heads // lists.heads):
            for begin, size in lists.split(count, BLOCK_ROWS * (8 * slots + 2 * lists.capacity)):
                yield Launch(lists, order, first_head, first + begin, size, slots)
        first_head += lists.heads


class _Group(NamedTuple):
    heads: int
    keys: int  # of a row, at most
    slots: int


def _head_classes(coarse: BinMask, width: int, num_keys: int, programs: int) -> Iterator[tuple[BinMask, Tensor | None]]:
    """The masks of heads that need equally many slots, and the order in which they lie side by side.

    ``programs`` is the number of programs that a head has.
    """
    budget = coarse.budget
    if budget is None or budget.head_keys is None:
        yield coarse, None
        return
    groups = _group_heads(coarse, width, num_keys, programs)
    if len(groups) == 1:
        yield _with_keys(coarse, groups[0].keys), None
        return
    order, first = budget.head_keys.order, 0
    for group in groups:
        bits = coarse.bits.index_select(1, order[first : first + group.heads])
        yield _with_keys(replace(coarse, bits=bits), group.keys), order
        first += group.heads


def _with_keys(coarse: BinMask, keys: int) -> BinMask:
    return replace(coarse, budget=RowBudget(keys, coarse.budget.forced))


def _group_heads(coarse: BinMask, width: int, num_keys: int, programs: int) -> list[_Group]:
    """Heads that need equally many slots where bins are widest, the fewest slots first."""
    bin_width = 1 << (count_levels(num_keys, coarse.num_bins) - 1)
    groups = []
    for keys, heads in sorted(Counter(coarse.budget.head_keys.keys).items()):
        slots = _slots(_most_candidates(_with_keys(coarse, keys), bin_width, width, num_keys))
        groups.append(_Group(heads, keys, slots))
        if len(groups) > 1 and (groups[-2].slots == slots or groups[-2].heads * programs < FEW_PROGRAMS):
            _join(groups, len(groups) - 2)
    while len(groups) > MAX_CLASSES:  # where it adds the fewest slots
        added = [low.heads * (high.slots - low.slots) for low, high in itertools.pairwise(groups)]
        _join(groups, added.index(min(added)))
    return groups


def _join(groups: list[_Group], place: int) -> None:
    """Let a group join the next."""
    low, high = groups[place : place + 2]
    groups[place : place + 2] = [high._replace(heads=low.heads + high.heads)]


def _block_ranges(lists: EntryLists, few_blocks: int) -> list[tuple[int, int, int]]:
    """(first block, number of blocks, slots): rows of one bin width need equally many slots.

    Fewer than ``few_blocks`` join the blocks after them.
    """
    num_bins, num_keys, stride = lists.mask.num_bins, lists.num_keys, lists.stride
    levels = count_levels(num_keys, num_bins)
    bounds = [_most_candidates(lists.mask, 1 << level, lists.unit, num_keys) for level in range(levels)]
    cached = num_keys - lists.num_queries
    if lists.spans is not None or not lists.causal:  # any row may be short
        edges = {0}
    else:
        rows = [max(0, (num_bins << level) - cached) for level in range(levels - 1)]
        edges = {0} | {row // (stride * BLOCK_ROWS) for row in rows if row < lists.num_queries}
    ranges = []
    for first, last in itertools.pairwise([*sorted(edges), cdiv(lists.num_groups, BLOCK_ROWS)]):
        longest = min(num_keys, cached + last * stride * BLOCK_ROWS)
        shortest = cached + max(0, first * BLOCK_ROWS - 1) * stride + 1 if first else 1
        slots = _slots(max(bounds[count_levels(shortest, num_bins) - 1 : count_levels(longest, num_bins)]))
        if ranges and (ranges[-1][2] == slots or ranges[-1][1] < few_blocks):
            ranges[-1] = (ranges[-1][0], last - ranges[-1][0], max(slots, ranges[-1][2]))
        else:
            ranges.append((first, last - first, slots))
    return ranges


def _slots(candidates: int) -> int:
    return max(16, next_power_of_2(candidates))


def _most_candidates(coarse: BinMask, bin_width: int, width: int, num_keys: int) -> int:
    """Runs that a row with bins of ``bin_width`` keys can choose from, at most."""
    most = coarse.num_bins if coarse.budget is None else min(coarse.num_bins, coarse.budget.most_bins(bin_width))
    per_bin = max(1, bin_width // width)
    return min(most * per_bin, cdiv(min(num_keys, coarse.num_bins * bin_width), width))
