"""PyTorch form of the far field: runs are pooled once per width, then chunks of rows attend to keys and runs."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..bins import aligned_width
from ..chunks import is_differentiated, row_chunks, run_chunk, without_autocast, working_dtype
from ..masks import BinMask, RunMask, kept_keys, unpack_bits
from ..spans import RowSpans


class Pool(NamedTuple):
    """All runs of one width, pooled around each head's centre; run 0 starts at the item's first real key.

    Attributes:
        key: ``[N, H, C, D]``, k~.
        value: ``[N, H, C, E]``, v~.
        prior: ``[N, H, C]``, log of the run's mass for a query at the centre.
    """

    key: Tensor
    value: Tensor
    prior: Tensor


def far_field_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: BinMask | RunMask,
    coarse: BinMask | None,
    spans: RowSpans,
    *,
    centre: Tensor,
    causal: bool,
    scaling: float,
) -> Tensor:
    """See :func:`sea_kernels.far_field_attention`."""
    batch, heads, num_queries, _ = query.shape
    num_keys, dtype = key.shape[2], working_dtype(query.dtype)
    chunks = row_chunks(num_queries, 2 * batch * heads * num_keys)
    recompute = len(chunks) > 1 and is_differentiated(query, key, value, centre)
    real = spans.length.amax(-1)
    key, value = (_real_first(x.to(dtype), spans.start, real) for x in (key, value))
    spans = spans._replace(start=torch.zeros_like(spans.start))
    centre = centre.to(dtype)
    outputs = []
    with without_autocast(query):
        pools = _pool_widths(key, value, centre, kept, coarse, spans, real)
        for rows in chunks:
            end = num_keys - num_queries + rows.stop if causal else num_keys
            args = query[:, :, rows], key[:, :, :end], value[:, :, :end], pools, centre, kept, coarse, spans, rows
            outputs.append(run_chunk(_attend, *args, causal, scaling, recompute=recompute))
        return torch.cat(outputs, 2)


def _real_first(tensor: Tensor, start: Tensor, real: Tensor) -> Tensor:
    """``[N, G, S, D]`` with the ``real [N]`` keys from ``start [N]`` on moved to the front, zeros behind them."""
    place = torch.arange(tensor.shape[2], device=tensor.device)
    index = (place + start[:, None]).clamp_max(tensor.shape[2] - 1)
    moved = tensor.gather(2, index[:, None, :, None].expand_as(tensor))
    return moved.masked_fill((place >= real[:, None])[:, None, :, None], 0)


def _pool_widths(
    key: Tensor,
    value: Tensor,
    centre: Tensor,
    kept: BinMask | RunMask,
    coarse: BinMask | None,
    spans: RowSpans,
    real: Tensor,
) -> dict[int, Pool]:
    """Pools of every bin width that a row has and of the second look's runs."""
    num_bins = kept.num_bins if coarse is None else coarse.num_bins
    num_keys = key.shape[2]
    counts = {
        width: min(num_bins, -(-num_keys // width)) for width in aligned_width(spans.length, num_bins).unique().tolist()
    }
    if isinstance(kept, RunMask):
        counts[kept.width] = -(-num_keys // kept.width)
    return {width: _pool(key, value, centre, real, width, count) for width, count in counts.items()}


def _pool(key: Tensor, value: Tensor, centre: Tensor, real: Tensor, width: int, count: int) -> Pool:
    """The first ``count`` runs of ``width`` keys; what runs without a real key hold is finite and never read."""
    runs = [pad(x, (0, 0, 0, count * width - x.shape[2])).unflatten(2, (count, width)) for x in (key, value)]
    logits = torch.einsum("grd,ngcwd->ngrcw", centre.unflatten(0, (key.shape[1], -1)), runs[0])
    place = torch.arange(count * width, device=key.device).view(count, width)
    hidden = (place >= real[:, None, None])[:, None, None]
    logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    weights = logits.softmax(-1)
    pooled = (torch.einsum("ngrcw,ngcwd->ngrcd", weights, x).flatten(1, 2) for x in runs)
    return Pool(*pooled, logits.logsumexp(-1).flatten(1, 2))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pools: dict[int, Pool],
    centre: Tensor,
    kept: BinMask | RunMask,
    coarse: BinMask | None,
    spans: RowSpans,
    rows: slice,
    causal: bool,
    scaling: float,
) -> Tensor:
    dtype = working_dtype(query.dtype)
    scaled = scaling * query.to(dtype)
    near = kept_keys(kept, spans, key.shape[2], rows)
    length = spans.length[:, rows]
    if causal and not query.is_cuda:  # on a GPU this check would stall the stream
        _check_own(near, length)
    grouped = scaled.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [N, G, H/G * R, D]
    scores, taken, values = [(grouped @ key.mT).view(near.shape)], [near], []
    for width, far in _far_runs(near, length, kept, coarse, rows):
        pool = Pool(*(x[:, :, : far.shape[-1]] for x in pools[width]))
        scores.append((scaled - centre[:, None]) @ pool.key.mT + pool.prior[:, :, None])
        taken.append(far)
        values.append(pool.value)
    # A finite fill and a second mask: padding rows end as zeros, and so does their gradient.
    dropped = ~torch.cat(taken, -1)
    weights = torch.cat(scores, -1).masked_fill(dropped, torch.finfo(dtype).min).softmax(-1).masked_fill(dropped, 0)
    near_weights, *far_weights = weights.split([x.shape[-1] for x in scores], -1)
    output = (near_weights.reshape(*grouped.shape[:3], -1) @ value).view(*query.shape[:3], -1)
    for part, pooled in zip(far_weights, values, strict=True):
        output = output + part @ pooled
    return output.to(query.dtype)


def _check_own(near: Tensor, length: Tensor) -> None:
    own = (length - 1).clamp_min(0)[:, None, :, None].expand(*near.shape[:3], 1)
    missing = ~near.gather(-1, own).squeeze(-1) & (length > 0)[:, None]
    if missing.any():
        item, head, row = missing.nonzero()[0].tolist()
        raise ValueError(
            f"kept leaves out a causal row's own position (first in item {item}, head {head}, {int(length[item, row])} "
            "keys long): the far field needs it in every row (keep_own)"
        )


def _far_runs(
    near: Tensor, length: Tensor, kept: BinMask | RunMask, coarse: BinMask | None, rows: slice
) -> Iterator[tuple[int, Tensor]]:
    """Widths of runs and which of them every row takes: bool ``[N, H, R, C]``, C no more than any row can see.

    Args:
        near: bool ``[N, H, R, S]``, kept keys.
        length: int64 ``[N, R]``.
    """
    num_keys = near.shape[-1]
    num_bins = kept.num_bins if coarse is None else coarse.num_bins
    bin_width = aligned_width(length, num_bins)
    split = None if coarse is None else unpack_bits(coarse.bits[:, :, rows], num_bins)
    fine = None
    for width in bin_width.unique().tolist():
        count = min(num_bins, -(-num_keys // width))
        exists = _exists(length, width, count) & (bin_width == width)[:, None, :, None]
        far = exists & ~_touched(near, width, count)
        if split is not None and width > kept.width:
            far &= ~split[..., :count]
            inside = _fit((exists & ~far).repeat_interleave(width // kept.width, -1), -(-num_keys // kept.width))
            fine = inside if fine is None else fine | inside
        yield width, far
    if fine is not None:
        count = fine.shape[-1]
        yield kept.width, fine & _exists(length, kept.width, count) & ~_touched(near, kept.width, count)


def _exists(length: Tensor, width: int, count: int) -> Tensor:
    """bool ``[N, 1, R, count]``: runs that hold a key of the row."""
    return (torch.arange(count, device=length.device) * width < length[..., None])[:, None]


def _touched(near: Tensor, width: int, count: int) -> Tensor:
    """bool ``[N, H, R, count]``: runs of which the row keeps a key."""
    return _fit(near, count * width).unflatten(-1, (count, width)).any(-1)


def _fit(tensor: Tensor, size: int) -> Tensor:
    """The last dimension cut, or filled up with False, to ``size``."""
    return pad(tensor, (0, size - tensor.shape[-1]))
