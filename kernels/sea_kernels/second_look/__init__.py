"""A second, finer look inside the coarse bins that a first look kept."""

from torch import Tensor

from ..backend import Backend, choose_backend, fits_kernels
from ..checks import check_mask, check_qkv, check_same_device, check_shape
from ..masks import BinMask, RunMask, group_leaders, take_rows
from ..spans import check_rows, row_spans

__all__ = ["second_look"]

MAX_KERNEL_WIDTH = 64  # keys per run that one program of the Triton form pools


def second_look(
    query: Tensor,
    key: Tensor,
    coarse: BinMask,
    *,
    k: int,
    width: int,
    window: int,
    causal: bool,
    scaling: float,
    mean_weight: Tensor,
    bound_weight: Tensor | None,
    keep_first: bool,
    attention_mask: Tensor | None = None,
    stride: int = 1,
    backend: Backend = "auto",
) -> RunMask:
    """Keep the best short runs of keys among those that the coarse bins kept, about ``k`` keys per row and head.

    A run is ``width`` keys at a multiple of ``width``. Every row of every head ranks the runs that overlap a kept
    coarse bin by ``mean_weight * (mean score) + bound_weight * (bound)``, both as in :func:`pooled_scores`; equal
    scores go to the lower run. For long inputs, whose coarse bins are too large to be kept whole. Beyond the paper.

    What a causal row keeps: its window (``window`` keys before its own run, and its own run up to its position), then
    the first run if ``keep_first``, then the best complete runs before the window. All of it counts against ``k``:
    the row keeps ``C = max(1, (k - window) / width - 1)`` runs beside the window, the quotient rounded half up. With
    ``window=0`` the own run is one of ``C = max(1, k / width)`` runs, and so is every run of a bidirectional row, which
    has no window. Rows with fewer candidates keep fewer runs. If C is 1, the own run is kept rather than the first.

    No gradient flows. The same inputs always give the same runs.

    Args:
        query: ``[N, H, T, D]``, the last T of the S positions.
        key: ``[N, G, S, D]``; query head h reads key head ``h // (H / G)``.
        coarse: kept bins of every row and head, in the aligned layout.
        k: keys that a row keeps, at least 1; it bounds the average, as no row keeps more than k rounded to whole runs.
        width: keys per run, a power of two.
        window: keys before the row's own run that are always kept, a multiple of ``width``; 0 if not causal.
        causal: whether a row sees only keys up to its own position. Bidirectional attention needs S = T.
        scaling: factor of the scores.
        mean_weight: ``[H]``, weight of the mean score.
        bound_weight: ``[H]``, weight of the bound, or None for means alone.
        keep_first: always keep the first run of keys.
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item.
        stride: rows that share one estimate (causal only): those whose positions have the same quotient by it take the
            runs of the first of them that is in ``query``, and a window that reaches back from there.
        backend: "auto", "reference" or "triton".

    Returns:
        A :class:`RunMask` with int32 starts ``[N, H, T, C]``, ascending, empty slots (-1) last.

    Raises:
        ValueError: if a shape, dtype, device or choice does not fit.
        NotImplementedError: for ``backend="triton"`` where it cannot run.
    """
    check_qkv(query, key)
    batch, heads, num_queries, _ = query.shape
    if not isinstance(coarse, BinMask) or coarse.layout != "aligned":
        found = coarse.layout if isinstance(coarse, BinMask) else type(coarse).__name__
        raise ValueError(f"coarse is {found!r}, expected a BinMask with layout 'aligned'")
    check_mask(coarse, query.shape, causal)
    check_shape("mean_weight", mean_weight, (heads,), "[num_heads]")
    if bound_weight is not None:
        check_shape("bound_weight", bound_weight, (heads,), "[num_heads]")
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    if width < 1 or width & (width - 1):
        raise ValueError(f"width is {width}, expected a power of two")
    if window < 0 or window % width or (window and not causal):
        allowed = f"a non-negative multiple of width {width}" if causal else "0 with causal=False"
        raise ValueError(f"window is {window}, expected {allowed}")
    if stride < 1 or (stride > 1 and not causal):
        raise ValueError(f"stride is {stride}, expected {'at least 1' if causal else '1 with causal=False'}")
    check_same_device(
        query=query,
        coarse=coarse.bits,
        mean_weight=mean_weight,
        bound_weight=bound_weight,
        attention_mask=attention_mask,
    )
    rows = (batch, num_queries, key.shape[2])
    check_rows(*rows, causal=causal, attention_mask=attention_mask)
    capacity = max(1, (2 * (k - window) + width) // (2 * width) - (1 if window else 0))
    options = {"capacity": capacity, "width": width, "window": window, "causal": causal, "scaling": scaling}
    options |= {"mean_weight": mean_weight, "bound_weight": bound_weight, "keep_first": keep_first}
    exists = fits_kernels(query) and width <= MAX_KERNEL_WIDTH
    if choose_backend(backend, query, triton_exists=exists, operation="second_look") == "triton":
        from . import triton

        starts = triton.second_look(
            query.detach(), key.detach(), coarse, attention_mask=attention_mask, stride=stride, **options
        )
    else:
        from . import reference

        spans = row_spans(*rows, causal=causal, attention_mask=attention_mask, device=query.device)
        starts = reference.second_look(query, key, coarse, spans, **options)
        if stride > 1:
            starts = take_rows(starts, group_leaders(spans, stride))
    return RunMask(starts, width, window, stride)
