"""Exact softmax attention over the keys that a sparse mask keeps."""

from torch import Tensor

from ..backend import Backend, choose_backend, fits_kernels
from ..checks import check_mask, check_qkv, check_same_device, check_shape
from ..masks import BinMask, RunMask
from ..spans import check_rows, row_spans

__all__ = ["sparse_attention"]


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BinMask | RunMask,
    *,
    causal: bool,
    scaling: float,
    attention_mask: Tensor | None = None,
    row_scale: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax attention of every row over the keys that it keeps (SEA, arXiv 2310.01777, section 3).

    ``out_t = row_scale_t * sum_j softmax_j(scaling * q_t . k_j) v_j`` over the keys j that are real, that row t may see
    and that ``mask`` keeps. A row that keeps nothing, and every padding row, gives 0. Computed in float32 for
    half-precision inputs, also under autocast; float64 stays float64. Gradients flow to query, key, value and
    row_scale, once: there is no second derivative in Triton. Memory is linear in T, in training too: the backward pass
    computes the scores again.

    Args:
        query: ``[N, H, T, D]``, the last T of the S positions.
        key: ``[N, G, S, D]``; query head h reads key head ``h // (H / G)``.
        value: ``[N, G, S, E]``.
        mask: kept bins (:class:`BinMask`) or kept runs of keys (:class:`RunMask`) of every row and query head.
        causal: whether a row sees only keys up to its own position. Bidirectional attention needs S = T.
        scaling: factor of the scores.
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item.
        row_scale: ``[N, H, T]``, any floating dtype, or None for 1.
        backend: "auto", "reference" or "triton".

    Returns:
        ``[N, H, T, E]`` in query's dtype.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
        TypeError: if ``mask`` is neither a BinMask nor a RunMask.
        NotImplementedError: for ``backend="triton"`` where it cannot run.
    """
    check_qkv(query, key, value)
    check_mask(mask, query.shape, causal)
    batch, heads, num_queries, _ = query.shape
    if row_scale is not None:
        check_shape("row_scale", row_scale, (batch, heads, num_queries), "[batch, num_heads, num_queries]")
    bits = mask.bits if isinstance(mask, BinMask) else mask.starts
    check_same_device(query=query, mask=bits, attention_mask=attention_mask, row_scale=row_scale)
    rows = (batch, num_queries, key.shape[2])
    check_rows(*rows, causal=causal, attention_mask=attention_mask)
    exists = fits_kernels(query, value)
    if choose_backend(backend, query, triton_exists=exists, operation="sparse_attention") == "triton":
        from . import gradient

        return gradient.sparse_attention(
            query,
            key,
            value,
            mask,
            causal=causal,
            scaling=scaling,
            attention_mask=attention_mask,
            row_scale=row_scale,
        )
    from . import reference

    spans = row_spans(*rows, causal=causal, attention_mask=attention_mask, device=query.device)
    return reference.sparse_attention(
        query, key, value, mask, spans, causal=causal, scaling=scaling, row_scale=row_scale
    )
