"""Sparse masks in forms for people and other libraries: counts, dense masks, and one CSR matrix per item (FlatCSR)."""

import torch
from torch import Tensor

from .bins import bin_sizes
from .checks import check_mask, check_same_device, check_shape
from .chunks import row_chunks
from .masks import BinMask, RunMask, kept_keys, unpack_bits, window_start
from .spans import RowSpans, row_spans


@torch.no_grad()
def count_keys(mask: BinMask | RunMask, *, num_keys: int, causal: bool, attention_mask: Tensor | None = None) -> Tensor:
    """Number of keys that every row keeps, without building the mask over keys.

    Args:
        mask: kept bins or runs.
        num_keys: S; the rows are the last T of the S positions.
        causal: whether a row sees only keys up to its own position.
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item.

    Returns:
        int64 ``[N, H, T]``, 0 in padding rows.

    Raises:
        ValueError: if a shape or device does not fit.
        TypeError: if ``mask`` is neither a BinMask nor a RunMask.
    """
    spans = _spans(mask, num_keys, causal, attention_mask)
    if isinstance(mask, RunMask):
        return _count_run_keys(mask, spans)
    batch, heads, num_queries, _ = mask.bits.shape
    counts = []
    for rows in row_chunks(num_queries, batch * heads * mask.num_bins):
        sizes = bin_sizes(spans.length[:, rows], mask.num_bins, mask.layout, mask.shift)
        counts.append((unpack_bits(mask.bits[:, :, rows], mask.num_bins) * sizes[:, None]).sum(-1))
    return torch.cat(counts, 2)


@torch.no_grad()
def to_dense(mask: BinMask | RunMask, *, num_keys: int, causal: bool, attention_mask: Tensor | None = None) -> Tensor:
    """The mask over keys, bool ``[N, H, T, S]``. It grows with T x S: for pictures and short inputs.

    Args, Raises: as :func:`count_keys`.
    """
    return kept_keys(mask, _spans(mask, num_keys, causal, attention_mask), num_keys)


@torch.no_grad()
def to_flat_csr(
    mask: BinMask | RunMask,
    *,
    num_keys: int,
    causal: bool,
    attention_mask: Tensor | None = None,
    values: Tensor | None = None,
) -> list[Tensor]:
    """The kept keys of every item as one CSR matrix whose columns run over heads, then keys (SEA, section 3.3).

    Built a chunk of rows at a time: memory grows with the number of kept keys.

    Args:
        mask: kept bins or runs.
        num_keys: S; the rows are the last T of the S positions.
        causal: whether a row sees only keys up to its own position.
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item.
        values: ``[N, H, T, S]``, of which the kept entries are stored; None stores float32 ones.

    Returns:
        N tensors of layout ``torch.sparse_csr`` and shape ``[T, H * S]``; key s of head h is column ``h * S + s``.

    Raises:
        ValueError: if a shape or device does not fit.
        TypeError: if ``mask`` is neither a BinMask nor a RunMask.
    """
    spans = _spans(mask, num_keys, causal, attention_mask)
    batch, heads, num_queries, _ = _words(mask).shape
    if values is not None:
        shape = (batch, heads, num_queries, num_keys)
        check_shape("values", values, shape, "[batch, num_heads, num_queries, num_keys]")
        check_same_device(mask=_words(mask), values=values)
    entries: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(batch)]
    for rows in row_chunks(num_queries, batch * heads * num_keys):
        kept = kept_keys(mask, spans, num_keys, rows).transpose(1, 2).flatten(2)  # [N, R, H * S]
        stored = None if values is None else values[:, :, rows].transpose(1, 2).flatten(2)
        for item in range(batch):
            columns = kept[item].nonzero()[:, 1]
            data = torch.ones(len(columns), device=kept.device) if stored is None else stored[item][kept[item]]
            entries[item].append((kept[item].sum(-1), columns, data))
    matrices = []
    for chunks in entries:
        counts, columns, data = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        row_start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        shape = num_queries, heads * num_keys
        matrices.append(torch.sparse_csr_tensor(row_start, columns, data, size=shape, check_invariants=True))
    return matrices


def _words(mask: BinMask | RunMask) -> Tensor:
    return mask.bits if isinstance(mask, BinMask) else mask.starts


def _spans(mask: BinMask | RunMask, num_keys: int, causal: bool, attention_mask: Tensor | None) -> RowSpans:
    if not isinstance(mask, BinMask | RunMask):
        raise TypeError(f"mask is a {type(mask).__name__}, expected a BinMask or a RunMask")
    words = _words(mask)
    check_mask(mask, words.shape, causal)
    check_same_device(mask=words, attention_mask=attention_mask)
    return row_spans(
        words.shape[0],
        words.shape[2],
        num_keys,
        causal=causal,
        attention_mask=attention_mask,
        device=words.device,
    )


def _count_run_keys(mask: RunMask, spans: RowSpans) -> Tensor:
    end = spans.length  # a row's runs end at its own position or, where it has a window, before that
    window = torch.zeros_like(end)
    if mask.window or mask.stride > 1:
        start = window_start(spans.position, mask)
        end, window = end.minimum(start), (spans.length - start).clamp_min(0)
    inside = (end[:, None, :, None] - mask.starts).clamp(0, mask.width)
    return torch.where(mask.starts >= 0, inside, 0).sum(-1) + window[:, None]
