"""Triton form of linear attention. Features are computed where they are used, from rows and projection; none is stored.

Causal: the sums of phi(k) v^T are taken over segments of keys, one running sum over the segments gives the state before
each, and a block of rows adds to its segment's state the masked products with the segment's own keys. Long inputs go
through in pieces, so that the states in memory have a fixed size. Bidirectional: one sum over all keys.
"""

import torch
from torch import Tensor

from ..triton_common import cdiv, item_spans, next_power_of_2, on_device, with_dense_rows
from .state import LinearState
from .triton_outputs import bidirectional_output_kernel, causal_output_kernel
from .triton_states import highest_kernel, scan_kernel, state_kernel

SEGMENT = 256  # keys per state: about as much work with the state as with the segment's own keys
STATE_ELEMENTS = 1 << 26  # of all states in memory at once: 256 MiB
PARTIAL_SUMS = 16  # of the bidirectional sum over keys: programs that share it


def causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    scaling: float,
    attention_mask: Tensor | None,
    initial_state: LinearState | None,
) -> tuple[Tensor, LinearState, Tensor]:
    """See :func:`sea_kernels.linear_attention`; also returns the rows' normalisers, float32 ``[N, H, T]``."""
    batch, heads, num_queries, head_dim = query.shape
    groups, num_keys, value_dim = value.shape[1:]
    query, key, value, projection = (with_dense_rows(tensor) for tensor in (query, key, value, projection))
    spans = item_spans(attention_mask)
    output = query.new_empty(batch, heads, num_queries, value_dim)
    normaliser = output.new_empty(batch, heads, num_queries, dtype=torch.float32)
    state, block = initial_state, block_size(query)
    with on_device(query):
        for first, count in pieces(key, value, projection):
            before, state = segment_states(key, value, projection, spans, state, first, count)
            first_block, blocks = row_blocks(query, key, first, count, block)
            if blocks <= 0:
                continue  # keys of the cache only
            causal_output_kernel[(blocks, heads, batch)](
                query,
                key,
                value,
                projection,
                *before,
                output,
                normaliser,
                spans,
                *query.stride()[:3],
                *key.stride()[:3],
                *value.stride()[:3],
                num_queries,
                num_keys,
                heads // groups,
                first_block,
                first,
                count,
                scaling * head_dim**-0.25,
                head_dim**-0.25,
                BLOCK=block,
                SEGMENT=SEGMENT,
                HAS_PADDING=spans is not None,
                **feature_sizes(query, projection),
                **value_sizes(value),
            )
    return output, state, normaliser


def bidirectional(
    query: Tensor, key: Tensor, value: Tensor, projection: Tensor, *, attention_mask: Tensor | None
) -> Tensor:
    """See :func:`sea_kernels.linear_attention`. No gradients."""
    batch, heads, num_rows, head_dim = query.shape
    groups, value_dim = value.shape[1], value.shape[3]
    query, key, value, projection = (with_dense_rows(tensor) for tensor in (query, key, value, projection))
    spans = item_spans(attention_mask)
    block = block_size(query)
    blocks = cdiv(num_rows, block)
    highest = key.new_empty(batch, groups, blocks, dtype=torch.float32)
    output = query.new_empty(batch, heads, num_rows, value_dim)
    options = {"BLOCK": block, "HAS_PADDING": spans is not None, **feature_sizes(query, projection)}
    with on_device(query):
        highest_kernel[(blocks, groups, batch)](
            key,
            projection,
            highest,
            spans,
            *key.stride()[:3],
            num_rows,
            head_dim**-0.25,
            **options,
        )
        part = cdiv(blocks, PARTIAL_SUMS)
        states = _sum_segments(key, value, projection, spans, 0, cdiv(blocks, part), part, highest.amax(-1))
        bidirectional_output_kernel[(blocks, heads, batch)](
            query,
            projection,
            *(state.sum(2) for state in states),
            output,
            spans,
            *query.stride()[:3],
            num_rows,
            heads // groups,
            head_dim**-0.25,
            **options,
            **value_sizes(value),
        )
    return output


def pieces(key: Tensor, value: Tensor, projection: Tensor) -> list[tuple[int, int]]:
    """First segment and number of segments of the parts of the keys whose states are in memory together."""
    segments = cdiv(key.shape[2], SEGMENT)
    elements = key.shape[0] * key.shape[1] * projection.shape[0] * value.shape[-1]
    most = max(1, STATE_ELEMENTS // elements)
    return [(first, min(most, segments - first)) for first in range(0, segments, most)]


def row_blocks(query: Tensor, key: Tensor, first: int, count: int, block: int) -> tuple[int, int]:
    """First block and number of blocks of positions that hold queries in ``count`` segments from ``first`` on."""
    num_keys = key.shape[2]
    begin = max(first * SEGMENT, num_keys - query.shape[2]) // block
    return begin, cdiv(min((first + count) * SEGMENT, num_keys), block) - begin


def segment_states(
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    spans: Tensor | None,
    initial: LinearState | None,
    first: int,
    count: int,
) -> tuple[tuple[Tensor, Tensor], LinearState]:
    """States before ``count`` segments from ``first`` on, and the state after them.

    Before: ``[N, G, count, M, E]`` and ``[N, G, count, M]``.
    """
    blocks = SEGMENT // block_size(key)
    sums = _sum_segments(key, value, projection, spans, first, count, blocks, None)
    return sums, scan(sums, initial)


def scan(sums: tuple[Tensor, ...], initial: LinearState | None, reverse: bool = False) -> LinearState:
    """Replace sums over segments by the state before (``reverse``: after) each, return the state beyond all of them."""
    final = [tensor.new_empty(*tensor.shape[:2], *tensor.shape[3:]) for tensor in sums]
    for tensor, start, end in zip(sums, initial or (None, None), final, strict=True):
        size = end[0, 0].numel()
        scan_kernel[(cdiv(size, 1024), tensor.shape[0] * tensor.shape[1])](
            tensor,
            None if start is None else start.float().contiguous(),
            end,
            tensor.shape[2],
            size,
            TILE=1024,
            HAS_INITIAL=start is not None,
            REVERSE=reverse,
        )
    return LinearState(*final)


def _sum_segments(
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    spans: Tensor | None,
    first: int,
    count: int,
    blocks: int,
    highest: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sums of phi(k) v^T and of phi(k) over segments of ``blocks`` blocks; exponential features with ``highest``."""
    batch, groups, num_keys, head_dim = key.shape
    shape = (batch, groups, count, projection.shape[0])
    key_value = key.new_empty(*shape, value.shape[-1], dtype=torch.float32)
    key_sum = key.new_empty(shape, dtype=torch.float32)
    tile = block_size(key)
    state_kernel[(count * cdiv(shape[-1], tile), groups, batch)](
        key,
        value,
        projection,
        highest,
        key_value,
        key_sum,
        spans,
        *key.stride()[:3],
        *value.stride()[:3],
        num_keys,
        first,
        count,
        blocks,
        head_dim**-0.25,
        BLOCK=block_size(key),
        HAS_PADDING=spans is not None,
        EXPONENTIAL=highest is not None,
        **feature_sizes(key, projection, tile),
        **value_sizes(value),
    )
    return key_value, key_sum


def block_size(rows: Tensor) -> int:
    """Rows per program, fewer where the products run outside the matrix units and need more registers."""
    return 64 if rows.element_size() < 4 else 32


def feature_sizes(rows: Tensor, projection: Tensor, tile: int = 32) -> dict:
    """Compile-time sizes of kernels that take features of rows, ``tile`` of them at a time."""
    head_dim = rows.shape[-1]
    return {
        "NUM_FEATURES": projection.shape[0],
        "HEAD_DIM": head_dim,
        "HEAD_PADDED": max(16, next_power_of_2(head_dim)),
        "TILE": tile,
        "PRECISION": "ieee" if rows.dtype == torch.float32 else "tf32",
    }


def value_sizes(value: Tensor) -> dict:
    """Compile-time sizes of kernels that read or write values, and how they are launched."""
    value_dim = value.shape[-1]
    wide = value_dim > 128  # then one stage of loads fills half of the shared memory
    return {
        "VALUE_DIM": value_dim,
        "VALUE_PADDED": max(16, next_power_of_2(value_dim)),
        "num_warps": 8 if wide else 4,
        "num_stages": 1 if wide else 2,
    }
