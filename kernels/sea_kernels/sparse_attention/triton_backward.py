"""Triton form of sparse attention's gradients.

The gradient of a query needs the keys that its row keeps: the forward's walk over the entry lists once more. The
gradients of a key need the rows that keep it: ``triton_backward_keys.py``. Aligned bins have kernels of their own for
both: ``triton_wide_rows_backward.py``, ``triton_wide_rows_keys.py``. Probabilities are computed again from each row's
log-sum-exp; nothing depends on the order in which programs run, so two runs give the same bits.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks import BinMask, RunMask, mask_of_heads
from ..triton_common import item_span, item_spans, next_power_of_2, on_device, row_span, with_dense_rows
from ..triton_entries import BLOCK_ROWS, RELATIVE_TILE, Entries, EntryLists
from ..triton_inverse import MOST_CHUNKS
from ..triton_wide_lists import WideLists
from ..triton_wide_rows_backward import differentiate_queries_in_bins
from ..triton_wide_rows_keys import differentiate_keys_in_bins
from .triton import LOG2E, count_steps, visit
from .triton_backward_keys import differentiate_keys

BUFFER_BYTES = 1 << 29  # the lists of the heads that are taken together


def sparse_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_scale: Tensor | None,
    output: Tensor,
    log_sum: Tensor,
    mask: BinMask | RunMask,
    walked: WideLists | None,
    *,
    causal: bool,
    scaling: float,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`sea_kernels.sparse_attention` to query, key, value and row_scale.

    Args:
        grad_output: ``[N, H, T, E]``, of ``output``.
        query: ``[N, H, T, D]``, and so on: the forward's inputs.
        output: ``[N, H, T, E]``, contiguous, what the forward returned.
        log_sum: float32 ``[N, H, T]``, contiguous, what it left.
        walked: the lists that it kept, if any.

    Returns:
        Tensors like query, key, value and row_scale.
    """
    spans = item_spans(attention_mask)
    query, key, value, grad_output = (with_dense_rows(x) for x in (query, key, value, grad_output))
    delta = torch.empty_like(log_sum)
    grad_query, grad_scale = torch.empty_like(query), None
    if row_scale is not None:
        grad_scale = torch.empty_like(row_scale, memory_format=torch.contiguous_format)
        row_scale = row_scale.float().contiguous()  # loads of two bytes cannot be pipelined
    # No program visits keys of padding.
    empty_like = torch.empty_like if spans is None else torch.zeros_like
    grad_key, grad_value = empty_like(key), empty_like(value)
    members = query.shape[1] // key.shape[1]
    with on_device(query):
        if isinstance(mask, BinMask) and mask.layout == "aligned":
            rows, keys = (grad_output, log_sum, delta), (key, value, mask)
            place = {"causal": causal, "scaling": scaling, "spans": spans, "row_scale": row_scale}
            more = {"grad_scale": grad_scale, "lists": walked}
            differentiate_queries_in_bins(query, output, *rows, *keys, grad_query, **place, **more)
            differentiate_keys_in_bins(query, *rows, *keys, grad_key, grad_value, **place)
            return grad_query, grad_key, grad_value, grad_scale
        for groups in _slices(mask, key.shape, members):
            heads = slice(groups.start * members, groups.stop * members)
            own = mask_of_heads(mask, heads)
            lists = EntryLists(own, key.shape[2], causal, spans)
            keys = [x[:, groups] for x in (key, value)]
            rows = [None if x is None else x[:, heads] for x in (query, grad_output, log_sum, delta, row_scale)]
            grads = [None if x is None else x[:, heads] for x in (output, grad_query, grad_scale)]
            kept = []
            for chunk in lists.chunks():
                entries = lists.build(*chunk)
                _differentiate_queries(*rows, *keys, *grads, lists, entries, scaling)
                if not lists.relative:  # the others have no use for them
                    kept.append(entries)
            differentiate_keys(*rows, *keys, grad_key[:, groups], grad_value[:, groups], lists, kept, scaling)
    return grad_query, grad_key, grad_value, grad_scale


def _slices(mask: BinMask | RunMask, key_shape: torch.Size, members: int) -> Iterator[slice]:
    """Key heads to be taken together, so that the lists of their runs stay small."""
    batch, groups, num_keys, _ = key_shape
    at_once = groups
    if isinstance(mask, RunMask):
        num_queries, slots = mask.starts.shape[2:]
        # An entry and a row in a unit's list for every run of a row, and the table that sorts them.
        size = batch * members * (12 * num_queries * slots + 8 * MOST_CHUNKS * (num_keys // mask.width))
        at_once = max(1, BUFFER_BYTES // max(1, size))
    for first in range(0, groups, at_once):
        yield slice(first, min(first + at_once, groups))


def _differentiate_queries(
    query: Tensor,
    grad_output: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    row_scale: Tensor | None,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    grad_query: Tensor,
    grad_scale: Tensor | None,
    lists: EntryLists,
    entries: Entries,
    scaling: float,
) -> None:
    """Fill ``grad_query``, ``grad_scale`` and, for the keys' gradients, ``delta``."""
    batch, heads, num_queries, head_dim = query.shape
    value_dim = value.shape[-1]
    relative = lists.relative
    row_bytes = max(head_dim, value_dim) * query.dtype.itemsize
    wide = row_bytes > 256
    _query_kernel[(entries.meta.shape[1], batch * heads)](
        query,
        key,
        value,
        output,
        grad_output,
        grad_query,
        log_sum,
        delta,
        row_scale,
        grad_scale,
        entries.packed,
        entries.meta,
        lists.source,
        lists.spans,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *output.stride()[:3],
        *grad_output.stride()[:3],
        *grad_query.stride()[:3],
        *log_sum.stride()[:2],
        heads,
        heads // key.shape[1],
        num_queries,
        key.shape[2],
        entries.first_block,
        scaling * LOG2E,
        scaling,
        lists.mask.shift if relative else 0,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        HEAD_PADDED=max(16, next_power_of_2(head_dim)),
        VALUE_PADDED=max(16, next_power_of_2(value_dim)),
        CAPACITY=lists.capacity,
        NUM_BINS=lists.mask.num_bins if relative else 32,
        ROWS=BLOCK_ROWS,
        TILE=RELATIVE_TILE if relative or wide else 32,
        CAUSAL=lists.causal,
        HAS_PADDING=lists.spans is not None,
        HAS_SCALE=row_scale is not None,
        RELATIVE=relative,
        HAS_SHIFT=relative and lists.mask.shift != 0,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=1 if row_bytes <= 128 else 2 if row_bytes <= 256 else 4,
        num_stages=2 if wide else 3,
    )


@triton.jit(
    do_not_specialize=["r_item", "r_head", "num_queries", "num_keys", "first_block", "shift", "scale", "scaling"]
)
def _query_kernel(
    Q,
    K,
    V,
    OUT,
    GRAD_OUT,
    GRAD_Q,
    LOG_SUM,
    DELTA,
    ROW_SCALE,
    GRAD_SCALE,
    ENTRIES,
    META,
    BITS,
    SPANS,
    q_item,
    q_head,
    q_row,
    k_item,
    k_head,
    k_row,
    v_item,
    v_head,
    v_row,
    o_item,
    o_head,
    o_row,
    g_item,
    g_head,
    g_row,
    gq_item,
    gq_head,
    gq_row,
    r_item,
    r_head,
    heads,
    heads_per_group,
    num_queries,
    num_keys,
    first_block,
    scale,
    scaling,
    shift,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    CAPACITY: tl.constexpr,
    NUM_BINS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, item_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    item, head = item_head // heads, item_head % heads
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = (first_block + block) * ROWS + tl.arange(0, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    m_row = rows < num_queries
    o_dim, o_value = tl.arange(0, HEAD_PADDED), tl.arange(0, VALUE_PADDED)
    m_dim, m_value = o_dim < HEAD_DIM, o_value < VALUE_DIM
    m_q, m_out = m_row[:, None] & m_dim[None, :], m_row[:, None] & m_value[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    b_q = tl.load(Q + item * q_item + head * q_head + long_rows * q_row + o_dim[None, :], mask=m_q, other=0.0)
    p_out = OUT + item * o_item + head * o_head + long_rows * o_row + o_value[None, :]
    p_grad = GRAD_OUT + item * g_item + head * g_head + long_rows * g_row + o_value[None, :]
    b_grad = tl.load(p_grad, mask=m_out, other=0.0)  # [ROWS, VALUE]
    b_out = tl.load(p_out, mask=m_out, other=0.0)
    delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    row_place = item * r_item + head * r_head + rows
    tl.store(DELTA + row_place, delta, mask=m_row)
    log_sum = tl.load(LOG_SUM + row_place, mask=m_row, other=0.0)
    K += item * k_item + (head // heads_per_group) * k_head + first.to(tl.int64) * k_row
    V += item * v_item + (head // heads_per_group) * v_head + first.to(tl.int64) * v_row

    place = item_head * tl.num_programs(0) + block
    ENTRIES += place * CAPACITY
    count = tl.load(META + place * 2)
    width = tl.load(META + place * 2 + 1)
    acc = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    mean = tl.zeros([ROWS], tl.float32)  # of the products with the gradient: the gradient of the row's factor
    factor = tl.zeros([ROWS], tl.float32) + 1.0
    if HAS_SCALE:
        factor = tl.load(ROW_SCALE + row_place, mask=m_row, other=0.0)
    for step in range(0, count_steps(count, width, TILE, RELATIVE)):
        o_key, keep = visit(
            ENTRIES,
            BITS + (item_head * num_queries + rows) * (NUM_BINS // 32),
            step,
            count,
            width,
            length,
            shift,
            m_row,
            NUM_BINS,
            ROWS,
            TILE,
            RELATIVE,
            HAS_SHIFT,
        )
        m_key = (o_key < real)[:, None]
        p_k = K + o_key.to(tl.int64)[:, None] * k_row + o_dim[None, :]
        b_k = tl.load(p_k, mask=m_key & m_dim[None, :], other=0.0)  # [TILE, HEAD]
        p_v = V + o_key.to(tl.int64)[:, None] * v_row + o_value[None, :]
        b_v = tl.load(p_v, mask=m_key & m_value[None, :], other=0.0)  # [TILE, VALUE]
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        weights = tl.where(keep, tl.exp2(scores - log_sum[:, None]), 0.0)
        products = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
        mean += tl.sum(weights * products, 1)
        grad_scores = weights * (products * factor[:, None] - delta[:, None])
        acc += tl.dot(grad_scores.to(b_k.dtype), b_k, input_precision=PRECISION)
    p_grad_q = GRAD_Q + item * gq_item + head * gq_head + long_rows * gq_row + o_dim[None, :]
    tl.store(p_grad_q, (acc * scaling).to(GRAD_Q.dtype.element_ty), mask=m_q)
    if HAS_SCALE:
        tl.store(GRAD_SCALE + row_place, mean.to(GRAD_SCALE.dtype.element_ty), mask=m_row)
