"""PyTorch form of linear attention. The normaliser is one more column of the values, so that one product gives both."""

import torch
from torch import Tensor
from torch.nn import functional

from ..chunks import is_differentiated, run_chunk, without_autocast, working_dtype
from .state import LinearState

CHUNK = 128  # rows whose products are taken directly; between chunks only the state is carried
EXP_EPSILON = 1e-4
RELU_EPSILON = 1e-3
SUM_EPSILON = 1e-6  # added to every feature's running key sum by the published causal form


def bidirectional(
    query: Tensor, key: Tensor, value: Tensor, projection: Tensor, *, attention_mask: Tensor | None
) -> Tensor:
    """Linear attention over all real keys with positive exponential features."""
    dtype = working_dtype(query.dtype)
    real = _real(attention_mask, key)
    with without_autocast(query):
        key_features = _exp_key_features(key.to(dtype), projection.to(dtype), real)
        state = key_features.mT @ _with_ones(value.to(dtype))
        query_features = _exp_query_features(query.to(dtype), projection.to(dtype))
        output = _normalise(_by_group(query_features, key.shape[1]) @ state, query.shape, real)
    return output.to(query.dtype)


def causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    scaling: float,
    attention_mask: Tensor | None,
    initial_state: LinearState | None,
) -> tuple[Tensor, LinearState]:
    """Linear attention over each row's prefix with relu features, chunk by chunk."""
    dtype = working_dtype(query.dtype)
    projection = projection.to(dtype) * query.shape[-1] ** -0.25
    real = _real(attention_mask, key)
    cached = key.shape[2] - query.shape[2]
    outputs = []
    with without_autocast(query):
        state = _join(initial_state, key, value, projection)
        recompute = key.shape[2] > CHUNK and is_differentiated(query, key, value, state)
        for keys in _slices(0, cached):
            chunk = key[:, :, keys], value[:, :, keys], real[:, keys]
            state = run_chunk(_read_keys, *chunk, projection, state, recompute=recompute)
        for keys in _slices(cached, key.shape[2]):
            rows = query[:, :, keys.start - cached : keys.stop - cached]
            chunk = key[:, :, keys], value[:, :, keys], real[:, keys]
            output, state = run_chunk(_causal_chunk, rows, *chunk, projection, state, scaling, recompute=recompute)
            outputs.append(output)
        return torch.cat(outputs, 2), LinearState(state[..., :-1], state[..., -1])


def _causal_chunk(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor, projection: Tensor, state: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Output of one chunk of rows and the state after it. state: ``[N, G, M, E + 1]``."""
    grouped = _by_group(scaling * query.to(state.dtype), key.shape[1])
    query_features = _relu_features(grouped, projection)  # [N, G, H/G * C, M]
    key_features = _relu_key_features(key.to(state.dtype), projection, real)  # [N, G, C, M]
    value = _with_ones(value.to(state.dtype))
    weights = (query_features @ key_features.mT).unflatten(2, (-1, query.shape[2])).tril().flatten(2, 3)
    sums = weights @ value + query_features @ state
    sums = torch.cat([sums[..., :-1], sums[..., -1:] + SUM_EPSILON * query_features.sum(-1, keepdim=True)], -1)
    output = _normalise(sums, query.shape, real)
    return output.to(query.dtype), state + key_features.mT @ value


def _read_keys(key: Tensor, value: Tensor, real: Tensor, projection: Tensor, state: Tensor) -> Tensor:
    key_features = _relu_key_features(key.to(state.dtype), projection, real)
    return state + key_features.mT @ _with_ones(value.to(state.dtype))


def _relu_features(rows: Tensor, projection: Tensor) -> Tensor:
    return (rows @ projection.mT).relu() + RELU_EPSILON


def _relu_key_features(key: Tensor, projection: Tensor, real: Tensor) -> Tensor:
    return _relu_features(key, projection).masked_fill(~real[:, None, :, None], 0)


def _exp_query_features(query: Tensor, projection: Tensor) -> Tensor:
    projected, half_norm = _project(query, projection)
    stabiliser = projected.amax(-1, keepdim=True)
    return ((projected - half_norm - stabiliser).exp() + EXP_EPSILON) * projection.shape[0] ** -0.5


def _exp_key_features(key: Tensor, projection: Tensor, real: Tensor) -> Tensor:
    projected, half_norm = _project(key, projection)
    padding = ~real[:, None, :, None]
    projected = projected.masked_fill(padding, torch.finfo(key.dtype).min)  # else padding would move the stabiliser
    stabiliser = projected.amax((-2, -1), keepdim=True)
    features = (projected - half_norm - stabiliser).exp() + EXP_EPSILON
    return features.masked_fill(padding, 0) * projection.shape[0] ** -0.5


def _project(rows: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    width = rows.shape[-1]
    projected = rows @ (projection * width**-0.25).mT
    return projected, rows.square().sum(-1, keepdim=True) / (2 * width**0.5)


def _normalise(sums: Tensor, shape: torch.Size, real: Tensor) -> Tensor:
    """Weighted mean from ``[N, G, H/G * T, E + 1]`` sums, 0 in padding rows: ``[N, H, T, E]``."""
    sums = sums.reshape(*shape[:3], -1)
    padding = ~real[:, None, :, None]
    mean = sums[..., :-1] / sums[..., -1:].masked_fill(padding, 1)
    return mean.masked_fill(padding, 0)


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """``[N, H, T, M]`` to ``[N, G, H/G * T, M]``: the query heads of one key head under each other."""
    return rows.unflatten(1, (groups, -1)).flatten(2, 3)


def _with_ones(value: Tensor) -> Tensor:
    return functional.pad(value, (0, 1), value=1.0)


def _real(attention_mask: Tensor | None, key: Tensor) -> Tensor:
    if attention_mask is None:
        return torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    return attention_mask != 0


def _join(initial: LinearState | None, key: Tensor, value: Tensor, projection: Tensor) -> Tensor:
    """``[N, G, M, E + 1]`` in projection's dtype: the initial state, or zeros."""
    if initial is None:
        return projection.new_zeros(*key.shape[:2], projection.shape[0], value.shape[-1] + 1)
    return torch.cat([initial.key_value, initial.key_sum[..., None]], -1).to(projection.dtype)


def _slices(first: int, last: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, last)) for start in range(first, last, CHUNK)]
