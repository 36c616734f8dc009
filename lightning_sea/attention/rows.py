"""Which rows are estimated together, and which of them are estimated at all."""

import torch
from torch import Tensor

from sea_kernels.spans import RowSpans

CHUNK_SCORES = 1 << 25  # scores of a chunk of rows: 128 MiB in float32
LEAST_ROWS = 256  # of a chunk, so that the rows that convolutions look back on weigh little


def rows_at_once(query: Tensor, num_bins: int, whole: bool) -> list[slice]:
    """The rows of ``query [N, H, T, D]``: all at once if ``whole``, else in chunks of about CHUNK_SCORES scores."""
    batch, heads, num_rows, _ = query.shape
    rows = num_rows if whole else max(LEAST_ROWS, CHUNK_SCORES // (batch * heads * num_bins))
    return [slice(first, min(first + rows, num_rows)) for first in range(0, num_rows, max(rows, 1))]


def spans_of_rows(spans: RowSpans, rows: slice) -> RowSpans:
    """The spans of ``rows`` alone."""
    return RowSpans(spans.start, spans.length[:, rows], spans.position[:, rows])


def leading_rows(spans: RowSpans, stride: int) -> tuple[Tensor, Tensor]:
    """Rows whose position is a multiple of ``stride``, and which of them each row follows.

    Args:
        spans: of R neighbouring causal rows.
        stride: rows per group, counted from each item's first real row.

    Returns:
        int64 ``[N, ceil(R / stride)]``, the leading rows (the last row where an item has fewer), and int64 ``[N, R]``,
        the index of each row's leader among them (any where that is no row of these).
    """
    position = spans.position
    num_rows = position.shape[1]
    num_groups = -(-num_rows // stride)
    first = -(-position[:, :1].clamp_min(0) // stride)  # group that is the first to begin here
    group = first + torch.arange(num_groups, device=position.device)
    leaders = (group * stride - position[:, :1]).clamp_max(num_rows - 1)
    return leaders, (position // stride - first).clamp(0, num_groups - 1)
