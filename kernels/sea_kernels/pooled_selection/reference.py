"""PyTorch form of the pooled selection: the scores of all rows, then the selection."""

from torch import Tensor

from ..chunks import working_dtype
from ..masks import share_bins
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
    return mask.bits if stride == 1 else share_bins(mask, spans, stride, keep_own=keep_own).bits
