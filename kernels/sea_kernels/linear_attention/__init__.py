"""Kernel-based linear attention: random features instead of a T x S score matrix."""

from torch import Tensor

from ..backend import Backend, choose_backend, fits_kernels
from ..checks import check_qkv, check_same_device, check_shape
from ..spans import check_rows
from .state import LinearState

__all__ = ["LinearState", "linear_attention"]


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    causal: bool,
    scaling: float = 1.0,
    attention_mask: Tensor | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    """Attention whose weights are products of random features, in time and memory linear in the length.

    ``out_t = phi(q_t) . sum_j phi(k_j) v_j^T / phi(q_t) . sum_j phi(k_j)`` over the keys that row t may see, with the
    features of SEA's estimator (Performer, arXiv 2009.14794, section 2):

    - bidirectional: ``phi(x) = M^-1/2 (exp(D^-1/4 P x - |x|^2 / (2 sqrt(D)) - m) + 1e-4)``, an estimate of the softmax
      kernel. m is the row's maximum of ``D^-1/4 P x`` for queries and the maximum over an item's real keys for keys.
      The features carry the factor 1/sqrt(D) themselves: ``scaling`` does not enter.
    - causal: ``phi(x) = relu(D^-1/4 P x) + 1e-3`` on ``scaling * query`` and on ``key``; every feature's key sum in the
      denominator has 1e-6 added, as in the published form.

    Computed in float32 for half-precision inputs, also under autocast; float64 stays float64. The Triton form takes the
    products of half-precision inputs in TF32, with sums in float32. Gradients flow to query, key, value and the initial
    state; in the Triton form those of causal rows are the same bits in every run.

    Args:
        query: ``[N, H, T, D]``, the last T of the S positions.
        key: ``[N, G, S, D]``; query head h reads key head ``h // (H / G)``.
        value: ``[N, G, S, E]``.
        projection: P, ``[M, D]``, rows of random directions.
        causal: whether a row sees only keys up to its own position. Bidirectional attention needs S = T.
        scaling: factor of the query (causal only).
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item. Padding keys take
            no part; padding rows give 0.
        initial_state: state of the keys before these (causal only), as an earlier call returned it.
        return_state: also return the state after the last key (causal only).
        backend: "auto", "reference" or "triton".

    Returns:
        ``[N, H, T, E]`` in query's dtype; with ``return_state``, a pair of it and the :class:`LinearState`.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or for a state with bidirectional attention.
        NotImplementedError: for ``backend="triton"`` where it cannot run.
    """
    _check(query, key, value, projection, causal, initial_state, return_state)
    batch, _, num_queries, _ = query.shape
    num_keys = key.shape[2]
    if attention_mask is not None:
        check_same_device(query=query, attention_mask=attention_mask)
    check_rows(batch, num_queries, num_keys, causal=causal, attention_mask=attention_mask)
    exists = fits_kernels(query, value)
    if choose_backend(backend, query, triton_exists=exists, operation="linear_attention") == "triton":
        from .gradient import TritonBidirectional, TritonCausal

        if not causal:
            return TritonBidirectional.apply(query, key, value, projection, attention_mask)
        initial = (None, None) if initial_state is None else initial_state
        output, *state = TritonCausal.apply(query, key, value, *initial, projection, attention_mask, scaling)
    else:
        from . import reference

        if not causal:
            return reference.bidirectional(query, key, value, projection, attention_mask=attention_mask)
        output, state = reference.causal(
            query, key, value, projection, scaling=scaling, attention_mask=attention_mask, initial_state=initial_state
        )
    return (output, LinearState(*state)) if return_state else output


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    causal: bool,
    initial_state: LinearState | None,
    return_state: bool,
) -> None:
    check_qkv(query, key, value)
    check_shape("projection", projection, (None, query.shape[-1]), "[num_features, head_dim]")
    check_same_device(query=query, projection=projection)
    if not causal and (initial_state is not None or return_state):
        given = "initial_state" if initial_state is not None else "return_state"
        raise ValueError(
            f"{given} was given with causal=False, expected causal=True: only causal attention has a state"
        )
    if initial_state is not None:
        batch, groups, features = key.shape[0], key.shape[1], projection.shape[0]
        shape = (batch, groups, features, value.shape[-1])
        meaning = "[batch, num_kv_heads, num_features, value_dim]"
        check_shape("initial_state.key_value", initial_state.key_value, shape, meaning)
        check_shape("initial_state.key_sum", initial_state.key_sum, shape[:3], "[batch, num_kv_heads, num_features]")
        check_same_device(query=query, **initial_state._asdict())
