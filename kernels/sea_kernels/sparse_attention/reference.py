"""PyTorch form of sparse attention: rows in chunks, each against the keys up to its last row."""

import torch
from torch import Tensor

from ..chunks import is_differentiated, row_chunks, run_chunk, without_autocast, working_dtype
from ..masks import BinMask, RunMask, kept_keys
from ..spans import RowSpans


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BinMask | RunMask,
    spans: RowSpans,
    *,
    causal: bool,
    scaling: float,
    row_scale: Tensor | None,
) -> Tensor:
    """See :func:`sea_kernels.sparse_attention`."""
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    chunks = row_chunks(num_queries, batch * heads * num_keys)
    recompute = len(chunks) > 1 and is_differentiated(query, key, value, row_scale)
    outputs = []
    with without_autocast(query):
        for rows in chunks:
            end = num_keys - num_queries + rows.stop if causal else num_keys
            args = query[:, :, rows], key[:, :, :end], value[:, :, :end], mask, spans, rows, scaling
            scale = None if row_scale is None else row_scale[:, :, rows]
            outputs.append(run_chunk(_attend, *args, scale, recompute=recompute))
        return torch.cat(outputs, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BinMask | RunMask,
    spans: RowSpans,
    rows: slice,
    scaling: float,
    row_scale: Tensor | None,
) -> Tensor:
    dtype = working_dtype(query.dtype)
    grouped = query.to(dtype).unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [N, G, H/G * R, D]
    scores = (scaling * grouped @ key.to(dtype).mT).view(*query.shape[:3], -1)  # [N, H, R, S]
    dropped = ~kept_keys(mask, spans, key.shape[2], rows)
    # A finite fill and a second mask: a row that keeps nothing ends as zeros, and so does its gradient.
    weights = scores.masked_fill(dropped, torch.finfo(dtype).min).softmax(-1).masked_fill(dropped, 0)
    output = (weights.view(*grouped.shape[:3], -1) @ value.to(dtype)).view(*query.shape[:3], -1)
    if row_scale is not None:
        output = output * row_scale.to(dtype)[..., None]
    return output.to(query.dtype)
