"""What the Triton kernels share: the valid keys of a row, aligned widths, sizes, and launching on the right device."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Context in which kernels launch on ``tensor``'s device, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def cdiv(size: int, step: int) -> int:
    """``size / step`` rounded up. Triton's own function also takes constants of kernels and needs microseconds."""
    return -(-size // step)


def next_power_of_2(size: int) -> int:
    """Smallest power of two that is at least ``size``, itself at least 1. Faster than Triton's own, as ``cdiv`` is."""
    return 1 << (size - 1).bit_length()


def with_dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def item_spans(attention_mask: Tensor | None) -> Tensor | None:
    """int32 ``[N, 2]``: first real key and number of real keys of each item; None without padding."""
    if attention_mask is None:
        return None
    real = attention_mask != 0
    return torch.stack([real.int().argmax(-1), real.sum(-1)], -1).int()


def count_levels(num_keys: int, num_bins: int) -> int:
    """Number of aligned widths 1, 2, 4, … that rows of up to ``num_keys`` keys can have."""
    return max(0, (num_keys - 1) // num_bins).bit_length() + 1


@triton.jit
def item_span(SPANS, item, num_keys, HAS_PADDING: tl.constexpr):
    """First real key and number of real keys of an item."""
    if HAS_PADDING:
        first = tl.load(SPANS + item * 2)
        real = tl.load(SPANS + item * 2 + 1)
    else:
        first = num_keys * 0
        real = num_keys
    return first, real


@triton.jit
def row_span(rows, num_queries, num_keys, first, real, CAUSAL: tl.constexpr):
    """Position of each row counted from the first real key, and the number of keys it may see (0 in padding rows)."""
    position = num_keys - num_queries + rows - first
    inside = (rows < num_queries) & (position >= 0) & (position < real)
    return position, tl.where(inside, position + 1 if CAUSAL else real, 0)


@triton.jit
def aligned_level(length, num_levels, NUM_BINS: tl.constexpr):
    """Smallest l with ``NUM_BINS * 2^l >= length``."""
    level = length * 0
    for step in range(0, num_levels):
        level += (length > (NUM_BINS << step)).to(tl.int32)
    return level


@triton.jit
def split_steps(begin, full, end, ROWS: tl.constexpr):
    """How a walk over rows from ``begin`` to ``end`` in steps of ROWS divides into steps with and without masks.

    full: first of the rows that need no mask.

    Returns the numbers of steps before those without masks, of these, which have all of their rows, and after them.
    """
    before = tl.cdiv(tl.maximum(tl.minimum(full, end) - begin, 0), ROWS)
    left = tl.maximum(end - begin - before * ROWS, 0)
    return before, left // ROWS, tl.cdiv(left % ROWS, ROWS)


@triton.jit
def first_of_step(begin, step, before, full_steps, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """First row of a step, counted among those with masks or those without, as ``split_steps`` has them."""
    if MASKED:
        step += tl.where(step < before, 0, full_steps)
    else:
        step += before
    return begin + step * ROWS


@triton.jit
def split_four(loaded):
    """Four vectors of a tile ``[4, ROWS]``, which one load has brought.

    Numbers of rows that are columns of a tile of scores come fastest so: of a vector with fewer elements than threads
    Triton has, up to 3.6, each thread load all that it needs itself, an instruction for each.
    """
    halves = tl.permute(tl.reshape(loaded, (2, 2, loaded.shape[1])), (2, 1, 0))
    low, high = tl.split(halves)
    first, second = tl.split(low)
    third, fourth = tl.split(high)
    return first, second, third, fourth


@triton.jit
def load_row_numbers(LEFT, RIGHT, LOG_SUM, DELTA, m_row):
    """Two words of bits, the log2 of the sum and the delta of some rows, from a pointer per row and number.

    m_row: the rows that there are, None if there are all.
    """
    integers = tl.pointer_type(tl.int32)
    o_kind = tl.arange(0, 4)[:, None]
    p_words = tl.where(o_kind == 0, LEFT[None, :], RIGHT[None, :])
    p_numbers = tl.where(o_kind == 2, LOG_SUM.to(integers)[None, :], DELTA.to(integers)[None, :])
    pointers = tl.where(o_kind < 2, p_words, p_numbers)
    loaded = tl.load(pointers) if m_row is None else tl.load(pointers, mask=m_row[None, :], other=0)
    left, right, log_sum, delta = split_four(loaded)
    return left, right, log_sum.to(tl.float32, bitcast=True), delta.to(tl.float32, bitcast=True)


@triton.jit
def group_rows(group, offset, stride):
    """Position of the first row of each group of ``stride`` positions, and the group's first row among the queries.

    group: index counted from the group of the first real query; offset: position of query row 0, negative where the
    queries begin with padding.
    """
    leader = (tl.maximum(offset, 0) // stride + group) * stride
    return leader, tl.maximum(leader, tl.maximum(offset, 0)) - offset
