"""Pooled-key scores: what a query would score against the pooled keys of every bin."""

from typing import Literal

from torch import Tensor

from ..backend import Backend, choose_backend, fits_kernels
from ..bins import LAYOUTS, Layout
from ..checks import check_bins, check_choice, check_qkv, check_same_device
from ..spans import check_rows, row_spans

__all__ = ["STATISTICS", "Statistic", "pooled_scores"]

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
    check_qkv(query, key)
    check_bins(num_bins)
    check_choice("layout", layout, LAYOUTS)
    check_choice("statistic", statistic, STATISTICS)
    if shift and layout == "aligned":
        raise ValueError(f"shift is {shift} with layout='aligned', expected 0: only relative edges move")
    check_same_device(query=query, attention_mask=attention_mask)
    rows = (query.shape[0], query.shape[2], key.shape[2])
    check_rows(*rows, causal=causal, attention_mask=attention_mask)
    options = {"num_bins": num_bins, "layout": layout, "causal": causal, "scaling": scaling}
    options |= {"statistic": statistic, "shift": shift}
    exists = fits_kernels(query)
    if choose_backend(backend, query, triton_exists=exists, operation="pooled_scores") == "triton":
        from .gradient import TritonScores

        return TritonScores.apply(query, key, attention_mask, options)
    from . import reference

    spans = row_spans(*rows, causal=causal, attention_mask=attention_mask, device=query.device)
    return reference.pooled_scores(query, key, spans, padded=attention_mask is not None, **options)
