"""Pooled-key scores and the selection of bins in one step, without the scores in memory."""

from torch import Tensor

from ..backend import Backend, choose_backend, fits_kernels
from ..checks import check_bins, check_qkv, check_same_device, check_shape
from ..masks import BinMask, HeadKeys, RowBudget
from ..spans import check_rows, row_spans

__all__ = ["pooled_selection"]


def pooled_selection(
    query: Tensor,
    key: Tensor,
    *,
    k: int,
    num_bins: int,
    causal: bool,
    scaling: float,
    mean_weight: Tensor,
    bound_weight: Tensor | None = None,
    keep_first: bool = True,
    keep_own: bool = True,
    attention_mask: Tensor | None = None,
    stride: int = 1,
    head_k: HeadKeys | None = None,
    backend: Backend = "auto",
) -> BinMask:
    """Keep each row's best aligned bins by the scores of its pooled keys, in time and memory linear in T.

    Row t of head h ranks its bins by ``mean_weight_h * mean + bound_weight_h * bound``, the two statistics of
    :func:`sea_kernels.pooled_scores`, and keeps as many as :func:`sea_kernels.select_bins` does with
    ``grouping="query"`` and ``layout="aligned"``: ``k`` keys, rounded to whole bins, the always-kept bins counted. The
    Triton form holds the scores of a block of rows in registers and writes bits only. Scores that differ by less than
    the rounding of query's dtype may rank either way. No gradients. Beyond the paper.

    Args:
        query: ``[N, H, T, D]``, the last T of the S positions.
        key: ``[N, G, S, D]``; query head h reads key head ``h // (H / G)``.
        k: keys that a row keeps, at least 1.
        num_bins: K, a multiple of 32.
        causal: whether a row sees only keys up to its own position. Bidirectional attention needs S = T.
        scaling: factor of the scores.
        mean_weight: ``[H]``, weight of the score of a bin's mean key.
        bound_weight: ``[H]``, weight of the upper bound from a bin's minimum and maximum, or None for 0.
        keep_first: always keep the bin of the row's first key.
        keep_own: always keep the bin of the row's own position.
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item.
        stride: rows that share one estimate (causal only, a divisor of K): those whose positions have the same
            quotient by it take the bits of the first of them that is in ``query``. With ``keep_own`` each also keeps
            the bins from its group's first position to its own.
        head_k: the keys, from 1 to ``k``, that rows of each head keep in place of ``k``; None for ``k``.
        backend: "auto", "reference" or "triton".

    Returns:
        A :class:`BinMask` (aligned) with int32 bits ``[N, H, T, K / 32]``.

    Raises:
        ValueError: if a shape, dtype, device or number does not fit.
        NotImplementedError: for ``backend="triton"`` where it cannot run: float64, or causal rows without ``keep_own``
            (a row's own, incomplete bin would need pooled keys of its own).
    """
    check_qkv(query, key)
    check_bins(num_bins)
    batch, heads, num_queries, _ = query.shape
    of_heads = {"mean_weight": mean_weight, "bound_weight": bound_weight}
    if head_k is not None:
        of_heads["head_k"] = head_k.tensor
        if not 1 <= min(head_k.keys) <= max(head_k.keys) <= k:
            raise ValueError(f"head_k is {head_k.keys}, expected from 1 to k = {k}")
    for name, values in of_heads.items():
        if values is not None:
            check_shape(name, values, (heads,), "[num_heads]")
    check_same_device(query=query, attention_mask=attention_mask, **of_heads)
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    if stride < 1 or num_bins % stride or (stride > 1 and not causal):
        allowed = f"a divisor of num_bins {num_bins}" if causal else "1 with causal=False"
        raise ValueError(f"stride is {stride}, expected {allowed}")
    rows = (batch, num_queries, key.shape[2])
    check_rows(*rows, causal=causal, attention_mask=attention_mask)
    options = {"k": k, "num_bins": num_bins, "causal": causal, "scaling": scaling, "mean_weight": mean_weight}
    options |= {"bound_weight": bound_weight, "keep_first": keep_first, "keep_own": keep_own, "stride": stride}
    options["head_k"] = head_k
    exists = fits_kernels(query) and (keep_own or not causal)
    if choose_backend(backend, query, triton_exists=exists, operation="pooled_selection") == "triton":
        from . import triton as implementation

        bits = implementation.pooled_selection(query.detach(), key.detach(), attention_mask=attention_mask, **options)
    else:
        from . import reference

        spans = row_spans(*rows, causal=causal, attention_mask=attention_mask, device=query.device)
        bits = reference.pooled_selection(
            query.detach(), key.detach(), spans=spans, attention_mask=attention_mask, **options
        )
    return BinMask(bits, num_bins, "aligned", budget=RowBudget(k, keep_first + keep_own, head_k))
