"""PyTorch form of the pooled selection: the scores of all rows, then the selection."""

from dataclasses import replace

import torch
from torch import Tensor

from ..chunks import working_dtype
from ..masks import HeadKeys, share_bins
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
    head_k: HeadKeys | None,
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
    options = {"causal": causal, "layout": "aligned", "grouping": "query", "keep_first": keep_first}
    options |= {"keep_own": keep_own, "num_keys": key.shape[2], "attention_mask": attention_mask}
    if head_k is None:
        mask = select_bins(scores, k=k, backend="reference", **options)
    else:
        alone = zip(scores.split(1, 1), head_k.keys, strict=True)
        parts = [select_bins(part, k=own, backend="reference", **options) for part, own in alone]
        mask = replace(parts[0], bits=torch.cat([part.bits for part in parts], 1))
    return mask.bits if stride == 1 else share_bins(mask, spans, stride, keep_own=keep_own).bits
