"""PyTorch form of the pooled selection: the scores of all rows, then the selection."""

import torch
from torch import Tensor

from ..bins import bin_of
from ..chunks import working_dtype
from ..masks import group_leaders, pack_bits, take_rows
from ..pooled_scores import pooled_scores
from ..select_bins import select_bins
from ..spans import RowSpans


def pooled_selection(
    query: Tensor,
    key: Tensor,
    *,
    k: int,
    num_bins: int,
    causal: bool,
    scaling: float,
    mean_weight: Tensor,
    bound_weight: Tensor | None,
    keep_first: bool,
    keep_own: bool,
    attention_mask: Tensor | None,
    stride: int,
    spans: RowSpans,
) -> Tensor:
    """See :func:`sea_kernels.pooled_selection`; returns the packed bits."""
    dtype = working_dtype(query.dtype)  # rounded scores would tie where the inputs do not
    rows = {"num_bins": num_bins, "layout": "aligned", "causal": causal, "scaling": scaling}
    rows |= {"attention_mask": attention_mask, "backend": "reference"}
    query, key = query.to(dtype), key.to(dtype)
    scores = pooled_scores(query, key, statistic="mean", **rows) * mean_weight.to(dtype)[:, None, None]
    if bound_weight is not None:
        bound = pooled_scores(query, key, statistic="bound", **rows)
        scores = scores + bound * bound_weight.to(dtype)[:, None, None]
    mask = select_bins(
        scores,
        k=k,
        causal=causal,
        layout="aligned",
        grouping="query",
        keep_first=keep_first,
        keep_own=keep_own,
        num_keys=key.shape[2],
        attention_mask=attention_mask,
        backend="reference",
    )
    return mask.bits if stride == 1 else _share(mask.bits, spans, stride, num_bins, keep_own)


def _share(bits: Tensor, spans: RowSpans, stride: int, num_bins: int, keep_own: bool) -> Tensor:
    """Bits of the first row of every group of ``stride`` positions for all rows of the group."""
    shared = take_rows(bits, group_leaders(spans, stride))
    if not keep_own:
        return shared
    length, position = spans.length, spans.position
    begin = position - position % stride
    own, begin = (bin_of(place, length, num_bins, "aligned")[..., None] for place in (position, begin))
    index = torch.arange(num_bins, device=bits.device)
    near = (index >= begin) & (index <= own) & (length > 0)[..., None]
    return shared | pack_bits(near)[:, None]
