"""What the kernels walk that take a block of rows at a time: kept keys, pooled runs inside bins, unsplit bins."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks import BinMask, RunMask
from ..triton_common import cdiv, count_levels, item_spans, next_power_of_2
from ..triton_entries import BLOCK_ROWS, Entries, EntryLists
from .triton_pool import Pool, pool

LOG2E = 1.4426950408889634
TILE = 32  # keys or runs at a time; also the bins of one word of a mask


class Walk:
    """Sizes, masks and pooled runs of one call.

    Args:
        query: ``[N, H, T, D]``.
        key: ``[N, G, S, D]``.
        value: ``[N, G, S, E]``.
        kept: what rows keep.
        coarse: the first look's bins if ``kept`` is a second look's.
        centre: ``[H, D]``.
        causal: whether a row sees only keys up to its own position.
        scaling: factor of the scores.
        attention_mask: ``[N, S]`` or None.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kept: BinMask | RunMask,
        coarse: BinMask | None,
        centre: Tensor,
        causal: bool,
        scaling: float,
        attention_mask: Tensor | None,
    ) -> None:
        self.query, self.key, self.value, self.centre = query, key, value, centre.contiguous()
        self.batch, self.heads, self.num_queries, self.head_dim = query.shape
        self.groups, self.num_keys, self.value_dim = value.shape[1:]
        self.row_bytes = next_power_of_2(max(self.head_dim, self.value_dim)) * query.itemsize
        self.causal, self.scaling, self.spans = causal, scaling, item_spans(attention_mask)
        self.kept, self.looks_twice = kept, isinstance(kept, RunMask)
        self.bins = coarse if self.looks_twice else kept
        self.bits = self.bins.bits.contiguous()
        self.levels = count_levels(self.num_keys, self.bins.num_bins)
        self.width = kept.width if self.looks_twice else 1
        self.stride = kept.stride if self.looks_twice else 1
        self.num_runs = cdiv(self.num_keys, self.width)
        self.near = EntryLists(kept, self.num_keys, causal, self.spans)
        self.inside = EntryLists(self.bins, self.num_keys, causal, self.spans, unit=self.width)

    def pooled_bins(self) -> Pool:
        """All aligned bins."""
        places = self.bins.num_bins * self.levels, self.bins.num_bins, 0
        return pool(self.key, self.value, self.centre, self.spans, *places)

    def pooled_runs(self) -> list[Pool]:
        """All runs, if there is a second look."""
        if not self.looks_twice:
            return []
        places = self.num_runs, 0, self.width.bit_length() - 1
        return [pool(self.key, self.value, self.centre, self.spans, *places)]

    def launches(self) -> Iterator[tuple[Entries, Entries]]:
        """After two looks: lists of what a launch's blocks keep, and of the bins inside which their runs lie."""
        for launch in self.near.split(cdiv(self.num_queries, BLOCK_ROWS), 8 * self.inside.capacity):
            yield self.near.build(*launch), self.inside.build(*launch)

    def arguments(self, near: Entries, inside: Entries, pools: list[Pool]) -> tuple:
        """What every walking kernel takes after its own arguments."""
        return (
            near.packed,
            near.meta,
            inside.packed,
            inside.meta,
            self.bits,
            *pools[0],
            *pools[-1],
            self.spans,
            *self.query.stride()[:3],
            *self.key.stride()[:3],
            *self.value.stride()[:3],
            self.heads,
            self.heads // self.groups,
            self.num_queries,
            self.num_keys,
            near.first_block,
            self.levels,
            self.num_runs,
            self.stride,
            self.scaling * LOG2E,
        )

    def row_arguments(self, grad_output: Tensor, log_sums: Tensor, delta: Tensor) -> tuple:
        """What every kernel that sums over rows takes after its own arguments."""
        return (
            self.query,
            grad_output,
            log_sums,
            delta,
            self.bits,
            self.near.source,
            self.spans,
            *self.query.stride()[:3],
            *grad_output.stride()[:3],
            self.heads,
            self.num_queries,
            self.num_keys,
            self.levels,
            self.stride,
            self.scaling,
        )

    def sizes(self) -> dict:
        """Constants of every kernel of the far field."""
        return {
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "HEAD_PADDED": max(16, next_power_of_2(self.head_dim)),
            "VALUE_PADDED": max(16, next_power_of_2(self.value_dim)),
            "NUM_BINS": self.bins.num_bins,
            "WIDTH": self.width,
            "WIDTH_LEVEL": self.width.bit_length() - 1,
            "CAUSAL": self.causal,
            "LOOKS_TWICE": self.looks_twice,
            "HAS_WINDOW": self.stride > 1,
            "HAS_PADDING": self.spans is not None,
            "PRECISION": "ieee" if self.query.dtype == torch.float32 else "tf32",
        }

    def rows_per_program(self) -> int:
        """Rows that the kernels take at a time whose rows share no list; wider ones are fewer."""
        return max(16, min(64, 8192 // self.row_bytes))

    def row_sizes(self) -> dict:
        """Constants and launch parameters of the kernels that sum over rows."""
        half = self.query.itemsize == 2
        return {
            "SLOTS": self.near.slots,
            "ROWS": self.rows_per_program(),
            "TILE": TILE,
            "num_warps": 4,
            "maxnreg": 128 if half else None,  # a few spilled registers cost less than idle warps
        }

    def list_sizes(self) -> dict:
        """Constants of the kernels that walk lists."""
        return {
            "CAPACITY": self.near.capacity,
            "INSIDE_CAPACITY": self.inside.capacity,
            "SEARCH_STEPS": self.near.capacity.bit_length(),
            "ROWS": BLOCK_ROWS,
            "TILE": TILE,
        }


@triton.jit
def window_begin(position, length, stride, WIDTH: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """First key of the window that rows sharing an estimate keep up to their own position, past the end if none."""
    begin = length
    if HAS_WINDOW:
        begin = tl.where(length > 0, (position // stride * stride) // WIDTH * WIDTH, 2147483647)
    return begin


@triton.jit
def sorted_entries(count, begin, length, WIDTH: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """How many of a block's entries are sorted: those of the rows' windows follow them."""
    if HAS_WINDOW:
        count -= (tl.max(length) + WIDTH - 1) // WIDTH - tl.min(begin) // WIDTH
        count = tl.where(tl.max(length) > 0, count, 0)
    return count


@triton.jit
def load_columns(P, o_column, m_column, row_stride, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows ``o_column`` of a matrix. [COLUMNS, PADDED]"""
    o_dim = tl.arange(0, PADDED)
    p_column = P + o_column.to(tl.int64)[:, None] * row_stride + o_dim[None, :]
    return tl.load(p_column, mask=m_column[:, None] & (o_dim < DIM)[None, :], other=0.0)


@triton.jit
def accumulate(scores, keep, b_v, highest, total, acc, PRECISION: tl.constexpr):
    """One step of the running softmax over scores in units of log 2."""
    scores = tl.where(keep, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_highest[:, None])
    rescale = tl.exp2(highest - new_highest)
    total = total * rescale + tl.sum(weights, 1)
    acc = acc * rescale[:, None] + tl.dot(weights.to(b_v.dtype), b_v, input_precision=PRECISION)
    return new_highest, total, acc


@triton.jit
def add_gradient(b_q, b_do, b_k, b_v, offset, keep, log_sum, delta, acc, scale, PRECISION: tl.constexpr):
    """Add what one tile of keys, or of pooled keys, contributes to the gradient of a block of rows."""
    scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale + offset[None, :]  # [ROWS, TILE]
    weights = tl.exp2(tl.where(keep, scores - log_sum[:, None], float("-inf")))
    grad = weights * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - delta[:, None])
    return acc + tl.dot(grad.to(b_k.dtype), b_k, input_precision=PRECISION)


@triton.jit
def near_keys(ENTRIES, count, width, step, length, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Keys of one tile of a block's list [TILE], and which rows keep them [ROWS, TILE]."""
    o_flat = step * TILE + tl.arange(0, TILE)
    entry = tl.load(ENTRIES + (o_flat >> width), mask=(o_flat >> width) < count, other=0)
    o_key = (entry >> 16).to(tl.int32) + (o_flat & ((1 << width) - 1))
    keep = ((entry.to(tl.int32)[None, :] >> tl.arange(0, ROWS)[:, None]) & 1) != 0
    return o_key, keep & (o_key[None, :] < length[:, None])


@triton.jit
def inside_runs(
    INSIDE,
    inside,
    unit,
    ENTRIES,
    count,
    step,
    end,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Runs of one tile of a block's coarse bins [TILE], and which rows take them pooled [ROWS, TILE].

    end: the key before which each row's pooled runs begin, 0 in rows whose bins are not split.
    """
    o_flat = step * TILE + tl.arange(0, TILE)
    entry = tl.load(INSIDE + (o_flat >> unit), mask=(o_flat >> unit) < inside, other=0)
    run = ((entry >> 16).to(tl.int32) // WIDTH) + (o_flat & ((1 << unit) - 1))
    bits = (entry & 0xFFFF).to(tl.int32) & ~_kept_bits(ENTRIES, count, run * WIDTH, STEPS)
    far = ((bits[None, :] >> tl.arange(0, ROWS)[:, None]) & 1) != 0
    return run, far & ((run * WIDTH)[None, :] < end[:, None])


@triton.jit
def unsplit_bins(
    p_word,
    ENTRIES,
    count,
    word,
    level,
    m_level,
    length,
    begin,
    WIDTH: tl.constexpr,
    WIDTH_LEVEL: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Which rows take the bins of one word of a level pooled. [ROWS, TILE]"""
    o_tile = tl.arange(0, TILE)
    start = (word * TILE + o_tile) << level
    bits = tl.load(p_word + word, mask=m_level, other=-1)
    split = ((bits[:, None] >> o_tile[None, :]) & 1) != 0
    if level <= WIDTH_LEVEL:  # bins within runs are not split: what does the row keep?
        run = start // WIDTH * WIDTH
        kept = _kept_bits(ENTRIES, count, run, STEPS)
        split = ((kept[None, :] >> tl.arange(0, ROWS)[:, None]) & 1) != 0
        split = split | (run[None, :] >= begin[:, None])
    return m_level[:, None] & (start[None, :] < length[:, None]) & (split == 0)


@triton.jit
def _kept_bits(ENTRIES, count, start, STEPS: tl.constexpr):
    """Row bits of the entry that begins at each ``start [TILE]`` (0 where none does), by bisection on the list."""
    low = start * 0
    high = low + count
    for _ in tl.static_range(STEPS):  # unrolled: Triton prefetches in innermost loops only
        middle = (low + high) // 2
        open_ = low < high
        smaller = (tl.load(ENTRIES + middle, mask=open_, other=0) >> 16).to(tl.int32) < start
        low = tl.where(open_ & smaller, middle + 1, low)
        high = tl.where(open_ & (smaller == 0), middle, high)
    entry = tl.load(ENTRIES + low, mask=low < count, other=-1)
    return tl.where((entry >> 16).to(tl.int32) == start, (entry & 0xFFFF).to(tl.int32), 0)
