"""Pooled-key scores: what a query would score against the pooled keys of every bin."""

from typing import Literal

from torch import Tensor

from ..backend import Backend, choose_backend, fits_kernels
from ..bins import LAYOUTS, Layout
from ..checks import check_bins, check_choice, check_qkv, check_same_device, check_shape
from ..chunks import working_dtype
from ..spans import check_rows, row_spans

__all__ = ["STATISTICS", "Statistic", "pooled_scores", "weighted_scores"]

Statistic = Literal["mean", "bound"]
STATISTICS = ("mean", "bound")


def pooled_scores(
    query: Tensor,
    key: Tensor,
    *,
    num_bins: int,
    layout: Layout,
    causal: bool,
    scaling: float,
    statistic: Statistic = "mean",
    attention_mask: Tensor | None = None,
    shift: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """Score of every row against every one of its K bins, from the keys of the bin pooled into one vector or two.

    - ``mean``: ``scaling * q . mean_j k_j``, the mean score of the bin's keys;
    - ``bound``: ``sum_d max(scaling * q_d * min_j k_jd, scaling * q_d * max_j k_jd)``, which no key's score exceeds.

    Only keys that the row may see are pooled: its own bin, where not complete, up to the row's position. A relative bin
    that holds no key scores as the key nearest to its middle; an aligned bin beyond the row's last one scores as the
    last one. Padding rows give 0. Computed in float32 for half-precision inputs (means from prefix sums in float64),
    also under autocast; float64 stays float64. The Triton form rounds pooled keys to key's dtype where rows share them.
    Time and memory are linear in T, except that ``bound`` keeps log2(S / K) copies of the keys (the Triton form: for
    causal relative bins only). Beyond the paper.

    Gradients flow to query and key. With aligned bins they have Triton kernels and repeat to the bit; with relative
    bins PyTorch computes them, whose sums on a GPU may differ from run to run. Where several keys have the minimum or
    maximum of a bin, the kernels pass its gradient to the first of them, the reference divides it among them.

    Args:
        query: ``[N, H, T, D]``, the last T of the S positions.
        key: ``[N, G, S, D]``; query head h reads key head ``h // (H / G)``.
        num_bins: K, a multiple of 32.
        layout: how bins stretch to keys, "relative" or "aligned".
        causal: whether a row sees only keys up to its own position. Bidirectional attention needs S = T.
        scaling: factor of the scores.
        statistic: "mean" or "bound".
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item.
        shift: edge jitter in 1/256 of a key (relative layout only).
        backend: "auto", "reference" or "triton".

    Returns:
        ``[N, H, T, K]`` in query's dtype.

    Raises:
        ValueError: if a shape, dtype, device or choice does not fit.
        NotImplementedError: for ``backend="triton"`` where it cannot run.
    """
    rows = _checked_rows(query, key, num_bins, layout, causal, attention_mask, shift)
    check_choice("statistic", statistic, STATISTICS)
    options = {"num_bins": num_bins, "layout": layout, "causal": causal, "scaling": scaling}
    options |= {"statistic": statistic, "shift": shift}
    exists = fits_kernels(query)
    if choose_backend(backend, query, triton_exists=exists, operation="pooled_scores") == "triton":
        from .gradient import TritonScores

        return TritonScores.apply(query, key, attention_mask, options)
    from . import reference

    spans = row_spans(*rows, causal=causal, attention_mask=attention_mask, device=query.device)
    return reference.pooled_scores(query, key, spans, padded=attention_mask is not None, **options)


def weighted_scores(
    query: Tensor,
    key: Tensor,
    *,
    mean_weight: Tensor,
    bound_weight: Tensor | None,
    num_bins: int,
    layout: Layout,
    causal: bool,
    scaling: float,
    attention_mask: Tensor | None = None,
    shift: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """``mean_weight * (mean score) + bound_weight * (bound)`` of every row and bin, both as in :func:`pooled_scores`.

    With aligned bins and a bound the Triton form pools once, and neither part exists in memory; its pooled keys are
    rounded to key's dtype, and its result is not rounded in between. The gradients of both weights flow, too, and
    repeat to the bit.

    Args:
        query: ``[N, H, T, D]``, the last T of the S positions.
        key: ``[N, G, S, D]``; query head h reads key head ``h // (H / G)``.
        mean_weight: ``[H]``.
        bound_weight: ``[H]``; None leaves the bound out.
        num_bins: K, a multiple of 32.
        layout: how bins stretch to keys, "relative" or "aligned".
        causal: whether a row sees only keys up to its own position. Bidirectional attention needs S = T.
        scaling: factor of the scores.
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item.
        shift: edge jitter in 1/256 of a key (relative layout only).
        backend: "auto", "reference" or "triton".

    Returns:
        ``[N, H, T, K]`` in float32 (float64 for float64 queries).

    Raises:
        ValueError: if a shape, dtype, device or choice does not fit.
        NotImplementedError: for ``backend="triton"`` where it cannot run.
    """
    _checked_rows(query, key, num_bins, layout, causal, attention_mask, shift)
    for name, weight in (("mean_weight", mean_weight), ("bound_weight", bound_weight)):
        if weight is not None:
            check_shape(name, weight, (query.shape[1],), "[num_heads]")
    check_same_device(query=query, mean_weight=mean_weight, bound_weight=bound_weight)
    options = {"num_bins": num_bins, "causal": causal, "scaling": scaling}
    exists = fits_kernels(query)
    choice = choose_backend(backend, query, triton_exists=exists, operation="weighted_scores")
    if choice == "triton" and layout == "aligned" and bound_weight is not None:
        from .gradient import TritonWeightedScores

        return TritonWeightedScores.apply(query, key, mean_weight, bound_weight, attention_mask, options)
    dtype = working_dtype(query.dtype)
    options |= {"layout": layout, "shift": shift, "attention_mask": attention_mask, "backend": backend}
    scores = mean_weight.to(dtype)[:, None, None] * pooled_scores(query, key, statistic="mean", **options).to(dtype)
    if bound_weight is not None:
        bound = pooled_scores(query, key, statistic="bound", **options).to(dtype)
        scores = scores + bound_weight.to(dtype)[:, None, None] * bound
    return scores


def _checked_rows(
    query: Tensor,
    key: Tensor,
    num_bins: int,
    layout: Layout,
    causal: bool,
    attention_mask: Tensor | None,
    shift: int,
) -> tuple[int, int, int]:
    """N, T and S, after the checks that all scores have in common."""
    check_qkv(query, key)
    check_bins(num_bins)
    check_choice("layout", layout, LAYOUTS)
    if shift and layout == "aligned":
        raise ValueError(f"shift is {shift} with layout='aligned', expected 0: only relative edges move")
    check_same_device(query=query, attention_mask=attention_mask)
    rows = (query.shape[0], query.shape[2], key.shape[2])
    check_rows(*rows, causal=causal, attention_mask=attention_mask)
    return rows
