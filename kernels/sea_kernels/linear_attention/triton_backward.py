"""Causal backward pass in Triton: deterministic, linear in the length, with features computed where they are used."""

from torch import Tensor

from ..triton_common import cdiv, item_spans, on_device, with_dense_rows
from . import triton as forward
from .state import LinearState
from .triton_gradients import gradient_state_kernel, key_gradient_kernel, query_gradient_kernel, row_kernel

BLOCK = 32  # rows or keys per program


def causal_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    output: Tensor,
    normaliser: Tensor,
    grad_output: Tensor,
    grad_state: LinearState,
    *,
    scaling: float,
    attention_mask: Tensor | None,
    initial_state: LinearState | None,
) -> tuple[Tensor, Tensor, Tensor, LinearState]:
    """Gradients to query, key, value and the initial state of ``causal`` in ``triton.py``.

    Args:
        output, normaliser: what the forward pass returned, ``[N, H, T, E]`` and float32 ``[N, H, T]``.
        grad_output: as ``output``; grad_state: gradient to the state after the last key.
    """
    query, key, value, projection = (with_dense_rows(tensor) for tensor in (query, key, value, projection))
    spans, grad_output = item_spans(attention_mask), with_dense_rows(grad_output)
    with on_device(query):
        rows = _row_factors(output, normaliser, grad_output, spans, key.shape[2])
        inputs = query, key, value, projection, grad_output, *rows
        grad_query = _query_gradient(inputs, spans, scaling, initial_state)
        return grad_query, *_key_gradients(inputs, spans, scaling, grad_state)


def _row_factors(
    output: Tensor, normaliser: Tensor, grad_output: Tensor, spans: Tensor | None, num_keys: int
) -> tuple[Tensor, Tensor]:
    """1 / normaliser and e of every row (see ``triton_gradients.py``), float32 ``[N, H, T]``; 0 in padding rows."""
    batch, heads, num_queries, _ = output.shape
    factors = normaliser.new_empty(2, batch, heads, num_queries)
    row_kernel[(cdiv(num_queries, BLOCK), heads, batch)](
        grad_output,
        output,
        normaliser,
        *factors,
        spans,
        *grad_output.stride()[:3],
        num_queries,
        num_keys,
        BLOCK=BLOCK,
        HAS_PADDING=spans is not None,
        **forward.value_sizes(output),
    )
    return factors[0], factors[1]


def _query_gradient(
    inputs: tuple[Tensor, ...], spans: Tensor | None, scaling: float, state: LinearState | None
) -> Tensor:
    query, key, value, projection, grad_output = inputs[:5]
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    grad = query.new_empty(query.shape)
    for first, count in forward.pieces(key, value, projection):
        before, state = forward.segment_states(key, value, projection, spans, state, first, count)
        first_block, blocks = forward.row_blocks(query, key, first, count, BLOCK)
        if blocks <= 0:
            continue
        query_gradient_kernel[(blocks, heads, batch)](
            *inputs,
            *before,
            grad,
            spans,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *grad_output.stride()[:3],
            num_queries,
            num_keys,
            heads // key.shape[1],
            first_block,
            first,
            count,
            scaling * head_dim**-0.25,
            head_dim**-0.25,
            BLOCK=BLOCK,
            SEGMENT=forward.SEGMENT,
            HAS_PADDING=spans is not None,
            **_sizes(query, value, projection),
        )
    return grad


def _key_gradients(
    inputs: tuple[Tensor, ...], spans: Tensor | None, scaling: float, state: LinearState
) -> tuple[Tensor, Tensor, LinearState]:
    """Gradients to key and value, and the gradient to the initial state, which comes out at the front."""
    query, key, value, projection, grad_output = inputs[:5]
    batch, heads, num_queries, head_dim = query.shape
    groups, num_keys = key.shape[1:3]
    grads = key.new_empty(key.shape), value.new_empty(value.shape)
    for first, count in reversed(forward.pieces(key, value, projection)):
        after, state = _gradient_states(inputs, scaling, state, first, count)
        blocks = cdiv(min(count * forward.SEGMENT, num_keys - first * forward.SEGMENT), BLOCK)
        key_gradient_kernel[(blocks, groups, batch)](
            *inputs,
            *after,
            *grads,
            spans,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *grad_output.stride()[:3],
            num_queries,
            num_keys,
            heads // groups,
            first,
            count,
            scaling * head_dim**-0.25,
            head_dim**-0.25,
            BLOCK=BLOCK,
            SEGMENT=forward.SEGMENT,
            HAS_PADDING=spans is not None,
            **_sizes(query, value, projection),
        )
    return *grads, state


def _gradient_states(
    inputs: tuple[Tensor, ...], scaling: float, state: LinearState, first: int, count: int
) -> tuple[list[Tensor], LinearState]:
    """Gradients to the states after ``count`` segments from ``first`` on, and to the state before the first."""
    query, key, value, projection, grad_output, *rows = inputs
    batch, groups, num_keys, _ = key.shape
    shape = (batch, groups, count, projection.shape[0])
    sums = [rows[0].new_empty(*shape, value.shape[-1]), rows[0].new_empty(shape)]
    block = forward.block_size(query)
    gradient_state_kernel[(count * cdiv(shape[-1], block), groups, batch)](
        query,
        projection,
        grad_output,
        *rows,
        *sums,
        *query.stride()[:3],
        *grad_output.stride()[:3],
        query.shape[2],
        num_keys,
        query.shape[1] // groups,
        first,
        count,
        scaling * query.shape[-1] ** -0.25,
        BLOCK=block,
        SEGMENT=forward.SEGMENT,
        **forward.feature_sizes(query, projection, block),
        **forward.value_sizes(value),
    )
    return sums, forward.scan(sums, state, reverse=True)


def _sizes(query: Tensor, value: Tensor, projection: Tensor) -> dict:
    return forward.feature_sizes(query, projection) | forward.value_sizes(value) | {"num_stages": 1}
