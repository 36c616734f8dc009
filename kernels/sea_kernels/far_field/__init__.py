"""Attention whose softmax holds every key: kept keys exactly, all others as pooled runs of keys (the far field)."""

import torch
from torch import Tensor

from ..backend import Backend, choose_backend, fits_kernels
from ..checks import check_mask, check_qkv, check_same_device, check_shape
from ..masks import BinMask, RunMask
from ..spans import check_rows, row_spans

__all__ = ["count_pooled", "far_field_attention"]


def far_field_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: BinMask | RunMask,
    coarse: BinMask | None = None,
    *,
    centre: Tensor,
    causal: bool,
    scaling: float,
    attention_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax attention of every row over the keys that it keeps and over everything else, pooled. Beyond the paper.

    The keys that a row does not keep fall into disjoint runs of neighbours. A run enters the row's softmax as one
    score with one value, the first order expansion of its mass and its mean value around a centre u of the queries::

        a_j = softmax of u . k_j over the run's keys j,  k~ = sum_j a_j k_j,  v~ = sum_j a_j v_j
        score = (scaling * q - u) . k~ + log sum_j exp(u . k_j)

    which is exact for runs of one key, and for every run where ``scaling * q`` is u; u = 0 pools plain means.

    The runs: aligned bins in which the row keeps nothing; after a second look, the bins that the first look kept (and
    those that a window or a forced run reaches into) split into runs of ``kept.width`` keys, of which those that are
    not kept take part. Where bins are no wider than such runs, bins are not split.

    Computed in float32 for half-precision inputs, also under autocast; float64 stays float64. Gradients flow to query,
    key, value and centre. Memory is linear in T, in training too: the backward pass computes the scores again. In
    Triton the same inputs give the same gradients to the bit.

    Args:
        query: ``[N, H, T, D]``, the last T of the S positions.
        key: ``[N, G, S, D]``; query head h reads key head ``h // (H / G)``.
        value: ``[N, G, S, E]``.
        kept: what every row and head keeps: aligned bins, or the runs that a second look left. A causal row keeps its
            own position, so that the bins that it does not keep are complete and hold no later key.
        coarse: the first look's aligned bins where ``kept`` is a :class:`RunMask`, else None.
        centre: ``[H, D]``, u: a typical ``scaling * query`` of the head. Any floating dtype.
        causal: whether a row sees only keys up to its own position. Bidirectional attention needs S = T.
        scaling: factor of the scores.
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item.
        backend: "auto", "reference" or "triton".

    Returns:
        ``[N, H, T, E]`` in query's dtype, 0 in padding rows.

    Raises:
        ValueError: if shapes, devices, layouts or the pair of masks do not fit, or (on the CPU) if a causal row does
            not keep its own position.
        TypeError: if ``kept`` is neither a BinMask nor a RunMask.
        NotImplementedError: for ``backend="triton"`` where it cannot run: float64, or a second look with a window or
            inside coarse bins that do not always hold the first and the row's own.
    """
    check_qkv(query, key, value)
    check_mask(kept, query.shape, causal)
    bins = _check_bins(kept, coarse, query, causal)
    check_shape("centre", centre, (query.shape[1], query.shape[3]), "[num_heads, head_dim]")
    words = kept.bits if isinstance(kept, BinMask) else kept.starts
    check_same_device(query=query, kept=words, coarse=bins.bits, centre=centre, attention_mask=attention_mask)
    rows = (query.shape[0], query.shape[2], key.shape[2])
    check_rows(*rows, causal=causal, attention_mask=attention_mask)
    exists = fits_kernels(query, value) and _fits_kernel(kept, coarse)
    if choose_backend(backend, query, triton_exists=exists, operation="far_field_attention") == "triton":
        from . import gradient

        place = {"causal": causal, "scaling": scaling, "attention_mask": attention_mask}
        return gradient.far_field_attention(query, key, value, kept, coarse, centre=centre, **place)
    from . import reference

    spans = row_spans(*rows, causal=causal, attention_mask=attention_mask, device=query.device)
    return reference.far_field_attention(
        query, key, value, kept, coarse, spans, centre=centre, causal=causal, scaling=scaling
    )


@torch.no_grad()
def count_pooled(
    kept: BinMask | RunMask,
    coarse: BinMask | None = None,
    *,
    num_keys: int,
    causal: bool,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Number of pooled runs in every row's softmax: what :func:`far_field_attention` reads beside the kept keys.

    In PyTorch, in time and memory linear in T: for monitoring, not for the hot path.

    Args:
        kept, coarse: as for :func:`far_field_attention`.
        num_keys: S; the rows are the last T of the S positions.
        causal: whether a row sees only keys up to its own position.
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item.

    Returns:
        int64 ``[N, H, T]``, 0 in padding rows.

    Raises:
        ValueError: if shapes, devices, layouts or the pair of masks do not fit.
        TypeError: if ``kept`` is neither a BinMask nor a RunMask.
    """
    words = kept.bits if isinstance(kept, BinMask) else kept.starts
    check_mask(kept, words.shape, causal)
    _check_bins(kept, coarse, words, causal)
    check_same_device(kept=words, coarse=None if coarse is None else coarse.bits, attention_mask=attention_mask)
    from . import counts

    rows = (words.shape[0], words.shape[2], num_keys)
    spans = row_spans(*rows, causal=causal, attention_mask=attention_mask, device=words.device)
    return counts.count_pooled(kept, coarse, spans)


def _fits_kernel(kept: BinMask | RunMask, coarse: BinMask | None) -> bool:
    """Whether every key that a row keeps lies in one of its coarse bins: then those bins alone are split."""
    if isinstance(kept, BinMask):
        return True
    return kept.window == 0 and coarse.budget is not None and coarse.budget.forced == 2


def _check_bins(kept: BinMask | RunMask, coarse: BinMask | None, query: Tensor, causal: bool) -> BinMask:
    """The mask that says what the bins are, checked."""
    if isinstance(kept, BinMask) == isinstance(coarse, BinMask):
        raise ValueError(
            f"coarse is a {type(coarse).__name__} beside a {type(kept).__name__}, expected a BinMask beside a RunMask "
            "and None beside a BinMask"
        )
    name, bins = ("kept", kept) if isinstance(kept, BinMask) else ("coarse", coarse)
    check_mask(bins, query.shape, causal)
    if bins.layout != "aligned":
        raise ValueError(f"{name}.layout is {bins.layout!r}, expected 'aligned'")
    return bins
