"""Which keys a query row may see, as two integers per row.

Padding is contiguous (all on the left, all on the right, or both), so the keys of row ``t`` of item ``n`` are the run
``[start[n], start[n] + length[n, t])`` and no mask of size T x S is ever needed.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RowSpans(NamedTuple):
    """Valid keys of every query row.

    Attributes:
        start: int64 ``[N]``, first real key of the item.
        length: int64 ``[N, T]``, number of keys that the row may see; 0 for padding rows.
        position: int64 ``[N, T]``, the row's own position counted from ``start``; meaningless in padding rows.
    """

    start: Tensor
    length: Tensor
    position: Tensor


def row_spans(
    batch: int,
    num_queries: int,
    num_keys: int,
    *,
    causal: bool,
    attention_mask: Tensor | None = None,
    device: torch.device | str | None = None,
) -> RowSpans:
    """Spans of the keys that each row may see.

    The queries are the last ``num_queries`` of the ``num_keys`` positions (a cache holds the others).

    Args:
        batch: number of items N.
        num_queries: T.
        num_keys: S, at least T; bidirectional attention needs S = T.
        causal: whether a row sees only keys up to its own position.
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, which must be one contiguous run per item;
            None means that all keys are real.
        device: where to build the result when there is no mask.

    Raises:
        ValueError: if the shapes do not fit, or (on the CPU) if an item's real keys are not contiguous.
    """
    _check_lengths(num_queries, num_keys, causal)
    if attention_mask is None:  # few operations: a layer builds its spans in every forward pass
        start = torch.zeros(batch, dtype=torch.int64, device=device)
        position = torch.arange(num_keys - num_queries, num_keys, device=device).expand(batch, -1)
        length = position + 1 if causal else torch.full_like(position, num_keys)
        return RowSpans(start, length, position)
    start, real = _mask_span(attention_mask, batch, num_keys)
    position = torch.arange(num_keys - num_queries, num_keys, device=start.device) - start[:, None]
    inside = (position >= 0) & (position < real[:, None])
    length = position + 1 if causal else real[:, None].expand_as(position)
    return RowSpans(start, torch.where(inside, length, 0), position)


def check_rows(
    batch: int, num_queries: int, num_keys: int, *, causal: bool, attention_mask: Tensor | None = None
) -> None:
    """Raise what ``row_spans`` raises, without launching anything on a GPU."""
    _check_lengths(num_queries, num_keys, causal)
    if attention_mask is not None:
        if attention_mask.is_cuda:
            _check_mask_shape(attention_mask, batch, num_keys)
        else:
            _mask_span(attention_mask, batch, num_keys)


def _check_lengths(num_queries: int, num_keys: int, causal: bool) -> None:
    if num_keys < num_queries or (not causal and num_keys != num_queries):
        raise ValueError(
            f"num_keys is {num_keys} with num_queries {num_queries}: causal attention needs num_keys >= num_queries, "
            "bidirectional attention needs them equal"
        )


def _check_mask_shape(attention_mask: Tensor, batch: int, num_keys: int) -> None:
    if attention_mask.shape != (batch, num_keys):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected [batch, num_keys] = {(batch, num_keys)}"
        )


def _mask_span(attention_mask: Tensor, batch: int, num_keys: int) -> tuple[Tensor, Tensor]:
    _check_mask_shape(attention_mask, batch, num_keys)
    mask = attention_mask != 0
    start, real = mask.int().argmax(-1), mask.sum(-1)
    if not mask.is_cuda:  # on a GPU this check would stall the stream; converted models check once per forward
        place = torch.arange(num_keys, device=mask.device)
        run = (place >= start[:, None]) & (place < (start + real)[:, None])
        if not torch.equal(run, mask):
            broken = int((run != mask).any(-1).nonzero()[0, 0])
            raise ValueError(
                f"attention_mask has a gap in item {broken}: real tokens must be contiguous (pad left or right)"
            )
    return start, real
