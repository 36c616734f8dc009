"""The two forms of a sparse attention mask: bits over bins, and short runs of keys. Neither grows with T x S."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .bins import Layout, bin_of
from .spans import RowSpans


class HeadKeys:
    """Keys that the rows of each head keep, known to the host and to a device.

    To be kept: making it lets the host wait for the device, and a CUDA graph cannot hold it.

    Args:
        keys: of every head.
        device: whose kernels read them.

    Attributes:
        keys: the same, as a tuple.
        tensor: the same, int32 ``[H]``.
        order: int32 ``[H]``, the heads from the fewest keys to the most.
    """

    def __init__(self, keys: Sequence[int], device: torch.device | str) -> None:
        self.keys = tuple(keys)
        order = sorted(range(len(self.keys)), key=self.keys.__getitem__)
        self.tensor, self.order = (torch.tensor(x, dtype=torch.int32, device=device) for x in (self.keys, order))


@dataclass(frozen=True)
class RowBudget:
    """How many bins a row that chose alone may keep (aligned layout): ``keys`` keys, but at least the forced bins.

    Attributes:
        keys: of a row of any head, at most.
        forced: bins that every row keeps.
        head_keys: keys of the rows of each head, None where all have ``keys``.
    """

    keys: int
    forced: int
    head_keys: HeadKeys | None = None

    def most_bins(self, width: int) -> int:
        """Bins of ``width`` keys that a row keeps at most, beside those that it added when sharing an estimate."""
        return max((2 * self.keys + width) // (2 * width), self.forced, 1)


@dataclass(frozen=True)
class BinMask:
    """One bit per bin: row ``(n, h, t)`` keeps every key whose bin's bit is set.

    Attributes:
        bits: int32 ``[N, H, T, K / 32]``; bin b is bit ``b % 32`` of word ``b // 32``.
        num_bins: K, a multiple of 32.
        layout: how bins stretch to keys, see ``bins.py``.
        shift: edge jitter in 1/256 of a key (relative layout only).
        budget: bound of the bins of a row, where whoever selected them knows one; sizes buffers.
    """

    bits: Tensor
    num_bins: int
    layout: Layout
    shift: int = 0
    budget: RowBudget | None = None


@dataclass(frozen=True)
class RunMask:
    """Short aligned runs of keys, the result of a second look.

    A row keeps (a) the keys ``[starts, starts + width)`` of each of its runs, (b) its window: the keys from
    ``window_start`` up to its own position (causal only). Positions count from the item's first real key.

    Attributes:
        starts: int32 ``[N, H, T, C]``, multiples of ``width``, ascending, -1 where a slot is empty. No run reaches
            into the row's window.
        width: keys per run, a power of two.
        window: keys before the row's own run that are always kept, a multiple of ``width``; 0 with a stride of 1 means
            no window at all, then the row's own run is one among the others.
        stride: rows that share one estimate; their window starts where the first of them has it.
    """

    starts: Tensor
    width: int
    window: int = 0
    stride: int = 1


def window_start(position: Tensor, mask: RunMask) -> Tensor:
    """First key of each row's always-kept window, counted from the item's first real key."""
    first = torch.div(position, mask.stride, rounding_mode="floor") * mask.stride
    return (torch.div(first, mask.width, rounding_mode="floor") * mask.width - mask.window).clamp_min(0)


def group_leaders(spans: RowSpans, stride: int) -> Tensor:
    """The row whose estimate each row uses if ``stride`` positions share one: int64 ``[N, T]``.

    It is the first real row of its group of positions that is among the queries. Padding rows lead themselves.
    """
    row = torch.arange(spans.position.shape[1], device=spans.position.device)
    leader = row - spans.position % stride
    first = (row - spans.position).clamp_min(0)  # row of the item's first real key, or row 0 if a cache holds it
    return torch.where(spans.length > 0, torch.maximum(leader, first), row)


def mask_of_heads(mask: BinMask | RunMask, heads: slice) -> BinMask | RunMask:
    """The mask of some query heads."""
    if isinstance(mask, BinMask):
        budget = mask.budget and replace(mask.budget, head_keys=None)  # the most keys of all heads remain a bound
        return replace(mask, bits=mask.bits[:, heads], budget=budget)
    return replace(mask, starts=mask.starts[:, heads])


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows ``rows [N, T]`` of ``tensor [N, H, T, C]``."""
    return tensor.gather(2, rows[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def share_bins(mask: BinMask, spans: RowSpans, stride: int, *, keep_own: bool) -> BinMask:
    """The mask in which every row keeps the bins of the first row of its group of ``stride`` positions.

    The first row of a group sees no later token, so sharing stays causal. What it could not know, the bins from the
    group's first position to a row's own, each row adds by itself.

    Args:
        mask: one selection per row.
        spans: of the same, causal rows.
        stride: rows per group, counted from each item's first real row.
        keep_own: whether the rows add the bins up to their own.
    """
    bits = take_rows(mask.bits, group_leaders(spans, stride))
    if keep_own:
        position, length = spans.position.clamp_min(0), spans.length
        begin, own = (
            bin_of(place, length, mask.num_bins, mask.layout, mask.shift)[..., None]
            for place in (position - position % stride, position)
        )
        index = torch.arange(mask.num_bins, device=bits.device)
        near = (index >= begin) & (index <= own) & (length > 0)[..., None]
        bits = bits | pack_bits(near)[:, None]
    return replace(mask, bits=bits)


def pack_bits(keep: Tensor) -> Tensor:
    """bool ``[..., K]`` to int32 ``[..., K / 32]``."""
    if keep.shape[-1] % 32:
        raise ValueError(f"keep has {keep.shape[-1]} bins in its last dimension, expected a multiple of 32")
    words = keep.unflatten(-1, (-1, 32)).long() << torch.arange(32, device=keep.device)
    words = words.sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack_bits(bits: Tensor, num_bins: int) -> Tensor:
    """int32 ``[..., K / 32]`` to bool ``[..., K]``."""
    if bits.shape[-1] * 32 != num_bins:
        raise ValueError(f"bits has {bits.shape[-1]} words of 32 in a row, expected num_bins / 32 = {num_bins / 32}")
    return ((bits[..., None] >> torch.arange(32, device=bits.device, dtype=torch.int32)) & 1).flatten(-2).bool()


def kept_keys(mask: BinMask | RunMask, spans: RowSpans, num_keys: int, rows: slice = slice(None)) -> Tensor:
    """Dense bool mask ``[N, H, R, S]`` of the rows in ``rows``. Grows with R x S: call it on a few rows at a time."""
    length, position = spans.length[:, rows], spans.position[:, rows]
    key = torch.arange(num_keys, device=length.device) - spans.start[:, None]  # [N, S]
    valid = (key[:, None] >= 0) & (key[:, None] < length[..., None])  # [N, R, S]
    if isinstance(mask, BinMask):
        index = bin_of(key[:, None].clamp_min(0), length[..., None], mask.num_bins, mask.layout, mask.shift)
        keep = unpack_bits(mask.bits[:, :, rows], mask.num_bins)  # [N, H, R, K]
        index = index[:, None].expand(-1, keep.shape[1], -1, -1)
        return keep.gather(-1, index) & valid[:, None]
    return _kept_runs(mask, spans, key, position, rows) & valid[:, None]


def _kept_runs(mask: RunMask, spans: RowSpans, key: Tensor, position: Tensor, rows: slice) -> Tensor:
    starts = mask.starts[:, :, rows]
    num_runs = key.shape[-1] // mask.width + 1
    run = torch.where(starts >= 0, starts.long() // mask.width, num_runs)
    kept = torch.zeros(*starts.shape[:-1], num_runs + 1, dtype=torch.bool, device=starts.device)
    kept = kept.scatter(-1, run, True)
    index = torch.div(key.clamp_min(0), mask.width, rounding_mode="floor")[:, None, None]
    kept = kept.gather(-1, index.expand(-1, starts.shape[1], starts.shape[2], -1))
    if mask.window or mask.stride > 1:
        inside = (key[:, None] >= window_start(position, mask)[..., None]) & (key[:, None] <= position[..., None])
        kept = kept | inside[:, None]
    return kept
