"""cosFormer: linear attention of rectified queries and keys that decays with distance (Qin et al., ICLR 2022)."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from sea_kernels.checks import check_qkv, check_same_device
from sea_kernels.chunks import is_differentiated, run_chunk, without_autocast, working_dtype
from sea_kernels.spans import row_spans

from .base import BaselineAttention

CHUNK = 128  # causal rows whose products are taken directly; earlier keys enter through their sums
EPSILON = 1e-6  # least normaliser: rectified queries may meet no key


class CosformerAttention(BaselineAttention):
    """Linear attention with cosine weights, see :func:`cosformer_attention`.

    Knobs: ``horizon`` (causal only). Has no parameters. The weights are normalised, so that the host's score factor
    cancels.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        attention_mask: Tensor | None = None,
        with_scores: bool = True,
    ) -> tuple[Tensor, None]:
        self._refuse_cache(query.shape[2], key.shape[2])
        context = cosformer_attention(
            query, key, value, causal=self.causal, horizon=self.config.horizon, attention_mask=attention_mask
        )
        return context.transpose(1, 2), None


def cosformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    horizon: int,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """cosFormer's attention (arXiv 2202.08791, section 3), in time and memory linear in the length.

    ``out_t = sum_j w_tj v_j / max(sum_j w_tj, 1e-6)`` over the keys j that row t may see, with weights
    ``w_tj = relu(q_t) . relu(k_j) cos(pi / 2 (t - j) / M)``. The cosine of a difference is cos cos + sin sin: the
    features are 2D wide. Positions count from the item's first real token. M is the item's number of real tokens in
    bidirectional attention; in causal attention, where a row must not know how many tokens follow, it is ``horizon``.

    Computed in float32 for half-precision inputs, also under autocast; float64 stays float64. Gradients flow to query,
    key and value; the backward pass of causal attention computes its products again.

    Args:
        query: ``[N, H, T, D]``.
        key: ``[N, G, T, D]``; query head h reads key head ``h // (H / G)``.
        value: ``[N, G, T, E]``.
        causal: whether a row sees only keys up to its own position.
        horizon: M of causal attention, in tokens, at least T.
        attention_mask: bool or integer ``[N, T]``, nonzero at real tokens, one contiguous run per item.

    Returns:
        ``[N, H, T, E]`` in query's dtype, 0 in padding rows.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or ``horizon`` is too short.
    """
    check_qkv(query, key, value)
    check_same_device(query=query, attention_mask=attention_mask)
    batch, _, num_queries, _ = query.shape
    num_keys = key.shape[2]
    if num_queries != num_keys:
        raise ValueError(f"query has {num_queries} rows with {num_keys} keys, expected equal numbers")
    if causal and num_keys > horizon:
        raise ValueError(f"horizon is {horizon} with {num_keys} keys, expected at least the longest input")
    place = {"causal": causal, "attention_mask": attention_mask, "device": query.device}
    spans = row_spans(batch, num_queries, num_keys, **place)
    reach = horizon if causal else spans.length.amax(-1, keepdim=True).clamp_min(1)
    angle = (math.pi / 2) * spans.position.to(working_dtype(query.dtype)) / reach
    attend = _causal if causal else _bidirectional
    with without_autocast(query):
        return attend(query, key, value, angle, spans.length > 0)


def _bidirectional(query: Tensor, key: Tensor, value: Tensor, angle: Tensor, real: Tensor) -> Tensor:
    state = _features(key, angle, real).mT @ _with_ones(value.to(angle.dtype))
    sums = _by_group(_features(query, angle, real), key.shape[1]) @ state
    return _weighted_mean(sums, query)


def _causal(query: Tensor, key: Tensor, value: Tensor, angle: Tensor, real: Tensor) -> Tensor:
    recompute = is_differentiated(query, key, value)
    return run_chunk(_causal_chunks, query, key, value, angle, real, recompute=recompute)


def _causal_chunks(query: Tensor, key: Tensor, value: Tensor, angle: Tensor, real: Tensor) -> Tensor:
    """All chunks at once, of L rows: a row meets its own chunk's keys directly and earlier ones through their sums."""
    num_rows, groups = query.shape[2], key.shape[1]
    query_features = _in_chunks(_features(query, angle, real)).unflatten(1, (groups, -1))  # [N, G, H/G, C, L, 2D]
    key_features = _in_chunks(_features(key, angle, real))[:, :, None]  # [N, G, 1, C, L, 2D]
    value = _in_chunks(_with_ones(value.to(angle.dtype)))[:, :, None]
    sums = key_features.mT @ value  # [N, G, 1, C, 2D, E + 1]
    before = functional.pad(sums[:, :, :, :-1], (0, 0, 0, 0, 1, 0)).cumsum(3)
    weights = (query_features @ key_features.mT).tril()
    output = weights @ value + query_features @ before
    return _weighted_mean(output.flatten(3, 4)[:, :, :, :num_rows], query)


def _in_chunks(rows: Tensor) -> Tensor:
    """``[N, H, T, M]`` to ``[N, H, C, CHUNK, M]``, rows of 0 at the end."""
    return functional.pad(rows, (0, 0, 0, -rows.shape[2] % CHUNK)).unflatten(2, (-1, CHUNK))


def _features(rows: Tensor, angle: Tensor, real: Tensor) -> Tensor:
    """relu(x) turned by the row's angle, 0 at padding: ``[N, H, T, D]`` to ``[N, H, T, 2D]`` in angle's dtype.

    Angles lie between 0 and pi/2: no feature is negative, and no sum of products cancels.
    """
    rows = rows.to(angle.dtype).relu().masked_fill(~real[:, None, :, None], 0)
    angle = angle[:, None, :, None]
    return torch.cat([rows * angle.cos(), rows * angle.sin()], -1)


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """``[N, H, T, M]`` to ``[N, G, H/G * T, M]``: the query heads of one key head under each other."""
    return rows.unflatten(1, (groups, -1)).flatten(2, 3)


def _with_ones(value: Tensor) -> Tensor:
    """One more column, whose weighted sum is the normaliser."""
    return functional.pad(value, (0, 1), value=1.0)


def _weighted_mean(sums: Tensor, query: Tensor) -> Tensor:
    """``[N, G, H/G * T, E + 1]`` sums to ``[N, H, T, E]`` in query's dtype."""
    sums = sums.reshape(*query.shape[:3], -1)
    return (sums[..., :-1] / sums[..., -1:].clamp_min(EPSILON)).to(query.dtype)
