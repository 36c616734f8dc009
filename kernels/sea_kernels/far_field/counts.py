"""How many pooled runs a row's softmax holds, counted from bits and starts: nothing of size T x S."""

import torch
from torch import Tensor

from ..bins import aligned_width
from ..chunks import row_chunks
from ..masks import BinMask, RunMask, unpack_bits, window_start
from ..spans import RowSpans


def count_pooled(kept: BinMask | RunMask, coarse: BinMask | None, spans: RowSpans) -> Tensor:
    """See :func:`sea_kernels.count_pooled`."""
    bins = kept if coarse is None else coarse
    batch, heads, num_queries, _ = bins.bits.shape
    counts = []
    for rows in row_chunks(num_queries, batch * heads * bins.num_bins):
        length, position = (x[:, None, rows] for x in (spans.length, spans.position))
        selected = unpack_bits(bins.bits[:, :, rows], bins.num_bins)
        if isinstance(kept, BinMask):
            width = aligned_width(length, bins.num_bins)
            counts.append((_existing(width, length, bins.num_bins) & ~selected).sum(-1))
        else:
            counts.append(_beside_runs(kept, kept.starts[:, :, rows].long(), selected, length, position))
    return torch.cat(counts, 2)


def _beside_runs(kept: RunMask, starts: Tensor, coarse: Tensor, length: Tensor, position: Tensor) -> Tensor:
    """int64 ``[N, H, R]``.

    Args:
        kept: where the window begins, and how wide runs are.
        starts: int64 ``[N, H, R, C]``.
        coarse: bool ``[N, H, R, K]``.
        length, position: int64 ``[N, 1, R]``.
    """
    num_bins = coarse.shape[-1]
    width = aligned_width(length, num_bins)
    window = window_start(position, kept).minimum(length) if kept.window or kept.stride > 1 else length
    is_run = (starts >= 0) & (starts < window[..., None])
    used = _parts(length, width)

    # Bins no wider than a run: those without a kept key.
    ends = (starts + kept.width).minimum(window[..., None])
    touched = torch.where(is_run, _parts(ends - starts, width[..., None]), 0).sum(-1)
    whole = used - touched - _parts(length - window, width)

    # Wider ones: those without a kept key that were not looked into, and the runs inside the others.
    index = torch.arange(num_bins, device=starts.device)
    bin_of_run = torch.where(is_run, torch.div(starts, width[..., None], rounding_mode="floor"), num_bins)
    bin_of_run = bin_of_run.clamp_max(num_bins)
    holds_run = coarse.new_zeros(*coarse.shape[:-1], num_bins + 1).scatter_(-1, bin_of_run, True)[..., :-1]
    in_window = ((index + 1) * width[..., None] > window[..., None]) & (window < length)[..., None]
    split = (coarse | holds_run | in_window) & _existing(width, length, num_bins)
    size = (length[..., None] - index * width[..., None]).minimum(width[..., None])
    inside = torch.where(split, _parts(size, kept.width), 0).sum(-1)
    kept_runs = is_run.sum(-1) + _parts(length - window, kept.width)
    return torch.where(width > kept.width, used - split.sum(-1) + inside - kept_runs, whole)


def _existing(width: Tensor, length: Tensor, num_bins: int) -> Tensor:
    """bool ``[N, 1, R, K]``: bins that hold a key of the row."""
    return torch.arange(num_bins, device=length.device) * width[..., None] < length[..., None]


def _parts(size: Tensor, width: Tensor | int) -> Tensor:
    """``size / width`` rounded up."""
    return torch.div(size + width - 1, width, rounding_mode="floor")
