"""Tiles of attention scores in base 2, shared by the Triton forms of distillation, and the log-sum-exp of rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import cdiv, item_span, next_power_of_2, on_device, row_span

LOG2E = 1.4426950408889634


def tile_config(*tensors: Tensor) -> dict:
    """Rows and keys of a tile and launch parameters for inputs ``[..., D]`` that are loaded side by side.

    The two larger tiles are the fastest that were measured for heads of 64 and of 128. What a program holds fits into
    its registers, and into little over 100 KiB of shared memory. Exact products of float32 take more registers.
    """
    width = sum(padded_width(tensor) * tensor.element_size() for tensor in tensors)
    exact = product_precision(*tensors) == "ieee"
    if width <= 256 and not exact:
        return {"ROWS": 64, "KEYS": 64, "num_warps": 4, "num_stages": 3}
    if width <= 512 and not exact:
        return {"ROWS": 64, "KEYS": 64, "num_warps": 4, "num_stages": 2}
    if width <= (512 if exact else 1024):
        return {"ROWS": 32, "KEYS": 32, "num_warps": 4, "num_stages": 2}
    return {"ROWS": 16, "KEYS": 16, "num_warps": 4, "num_stages": 1}


def padded_width(tensor: Tensor) -> int:
    """Columns that a tile of ``tensor [..., D]`` has in a kernel."""
    return max(16, next_power_of_2(tensor.shape[-1]))


def product_precision(*tensors: Tensor) -> str:
    """How products of float32 tiles are computed: exactly; it has no meaning for half precision."""
    return "ieee" if any(tensor.dtype == torch.float32 for tensor in tensors) else "tf32"


def row_lse(query: Tensor, key: Tensor, spans: Tensor | None, *, causal: bool, scaling: float) -> Tensor:
    """Logarithm of the sum of ``exp(scaling * q . k)`` over the keys that each row sees.

    Args:
        query: ``[N, H, T, D]`` with contiguous rows.
        key: ``[N, G, S, D]`` with contiguous rows.
        spans: int32 ``[N, 2]`` of ``triton_common.item_spans``.
        causal: whether a row sees only keys up to its own position.
        scaling: factor of the scores.

    Returns:
        float32 ``[N, H, T]``, 0 in padding rows.
    """
    batch, heads, num_queries, head_dim = query.shape
    lse = query.new_empty(batch, heads, num_queries, dtype=torch.float32)
    config = tile_config(query)
    with on_device(query):
        _lse_kernel[(cdiv(num_queries, config["ROWS"]), heads, batch)](
            query,
            key,
            lse,
            spans,
            *query.stride()[:3],
            *key.stride()[:3],
            heads // key.shape[1],
            num_queries,
            key.shape[2],
            scaling * LOG2E,
            HEAD_DIM=head_dim,
            HEAD_PADDED=padded_width(query),
            CAUSAL=causal,
            HAS_PADDING=spans is not None,
            PRECISION=product_precision(query),
            **config,
        )
    return lse


@triton.jit
def last_block_first(num_queries, ROWS: tl.constexpr):
    """Rows of this program: later rows of a causal map see more keys, and the longest work had better start first."""
    return (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)


@triton.jit
def load_rows(X, rows, m_row, x_row, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of ``X [..., WIDTH]``, zeros where masked, all of them if there is no mask. [ROWS, PADDED]"""
    o_dim = tl.arange(0, PADDED)
    p_x = X + rows.to(tl.int64)[:, None] * x_row + o_dim[None, :]
    m_dim = (o_dim < WIDTH)[None, :]
    if m_row is None:
        loaded = tl.load(p_x) if WIDTH == PADDED else tl.load(p_x, mask=m_dim, other=0.0)
    else:
        loaded = tl.load(p_x, mask=m_row[:, None] & m_dim, other=0.0)
    return loaded


@triton.jit
def keys_of_all(length, KEYS: tl.constexpr):
    """Keys, from the first on, in tiles that all rows see whole: scores of those need no mask."""
    return tl.min(length) // KEYS * KEYS


@triton.jit
def rows_lse(
    b_q,
    K,
    k_row,
    length,
    real,
    scale,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logarithm of the sum of ``2^(scale * q . k)`` over the keys of each row, from ``K`` on; 0 without keys. [ROWS]"""
    LN2: tl.constexpr = 0.6931471805599453
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    full = keys_of_all(length, KEYS)
    for masked in tl.static_range(2):
        for begin in range(full if masked else 0, tl.max(length) if masked else full, KEYS):
            o_key = begin + tl.arange(0, KEYS)
            b_k = load_rows(K, o_key, o_key < real if masked else None, k_row, HEAD_DIM, HEAD_PADDED)  # [KEYS, HEAD]
            scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale  # [ROWS, KEYS]
            if masked:
                scores = tl.where(o_key[None, :] < length[:, None], scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            total = total * tl.exp2(highest - new_highest) + tl.sum(tl.exp2(scores - new_highest[:, None]), 1)
            highest = new_highest
    return tl.where(length > 0, (highest + tl.log2(tl.where(length > 0, total, 1.0))) * LN2, 0.0)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "scale"])
def _lse_kernel(
    Q,
    K,
    LSE,
    SPANS,
    q_item,
    q_head,
    q_row,
    k_item,
    k_head,
    k_row,
    heads_per_group,
    num_queries,
    num_keys,
    scale,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = last_block_first(num_queries, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    m_row = rows < num_queries
    b_q = load_rows(Q + item * q_item + head * q_head, rows, m_row, q_row, HEAD_DIM, HEAD_PADDED)  # [ROWS, HEAD]
    K += item * k_item + (head // heads_per_group) * k_head + first.to(tl.int64) * k_row
    lse = rows_lse(b_q, K, k_row, length, real, scale, HEAD_DIM, HEAD_PADDED, ROWS, KEYS, PRECISION)
    tl.store(LSE + (item * tl.num_programs(1) + head) * num_queries + rows, lse, mask=m_row)
