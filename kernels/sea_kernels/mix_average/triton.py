"""Triton form: sums of chunks of values, a running sum over chunks, then every chunk mixes on its own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import cdiv, item_span, item_spans, next_power_of_2, on_device, row_span, with_dense_rows

CHUNK = 64  # keys per program
COLUMNS = 16  # of the values, whose running sum one program takes: few programs would leave a GPU idle


def mix_average(context: Tensor, value: Tensor, mix: Tensor, attention_mask: Tensor | None) -> Tensor:
    """See :func:`sea_kernels.mix_average`."""
    batch, heads, num_queries, width = context.shape
    groups, num_keys = value.shape[1:3]
    spans = item_spans(attention_mask)
    context, value, mix = with_dense_rows(context), with_dense_rows(value), mix.contiguous()
    chunks = cdiv(num_keys, CHUNK)
    sums = value.new_empty(batch, groups, chunks, width, dtype=torch.float32)
    out = torch.empty(context.shape, dtype=context.dtype, device=context.device)
    sizes = {"WIDTH": width, "PADDED": next_power_of_2(width), "CHUNK": CHUNK, "HAS_PADDING": spans is not None}
    with on_device(context):
        _sum_kernel[(chunks, groups, batch)](value, sums, spans, *value.stride()[:3], num_keys, **sizes)
        _prefix_kernel[(cdiv(width, COLUMNS), batch * groups)](sums, chunks, WIDTH=width, COLUMNS=COLUMNS)
        first_chunk = (num_keys - num_queries) // CHUNK  # earlier chunks hold cached keys only
        _mix_kernel[(chunks - first_chunk, heads, batch)](
            context,
            value,
            mix,
            sums,
            out,
            spans,
            *context.stride()[:3],
            *value.stride()[:3],
            num_queries,
            num_keys,
            first_chunk,
            heads // groups,
            chunks,
            **sizes,
        )
    return out


@triton.jit(do_not_specialize=["num_keys"])
def _sum_kernel(
    V,
    SUMS,
    SPANS,
    v_item,
    v_head,
    v_row,
    num_keys,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    chunk, group, item = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, _ = item_span(SPANS, item, num_keys, HAS_PADDING)
    o_key, o_dim = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, PADDED)
    m_value = ((o_key >= first) & (o_key < num_keys))[:, None] & (o_dim < WIDTH)[None, :]
    p_value = V + item * v_item + group.to(tl.int64) * v_head + o_key.to(tl.int64)[:, None] * v_row + o_dim[None, :]
    total = tl.sum(tl.load(p_value, mask=m_value, other=0.0).to(tl.float32), 0)
    place = (item * tl.num_programs(1) + group) * tl.num_programs(0) + chunk
    tl.store(SUMS + place * WIDTH + o_dim, total, mask=o_dim < WIDTH)


@triton.jit(do_not_specialize=["chunks"])
def _prefix_kernel(SUMS, chunks, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Replace each chunk's sum by the sum of the chunks before it."""
    o_dim, o_tile = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, 64)
    SUMS += tl.program_id(1).to(tl.int64) * chunks * WIDTH
    before = tl.zeros([COLUMNS], tl.float32)
    for begin in range(0, chunks, 64):
        m_sum = (begin + o_tile < chunks)[:, None] & (o_dim < WIDTH)[None, :]
        p_sum = SUMS + (begin + o_tile)[:, None] * WIDTH + o_dim[None, :]
        sums = tl.load(p_sum, mask=m_sum, other=0.0)
        tl.store(p_sum, tl.cumsum(sums, 0) - sums + before[None, :], mask=m_sum)
        before += tl.sum(sums, 0)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_chunk", "heads_per_group", "chunks"])
def _mix_kernel(
    C,
    V,
    MIX,
    BEFORE,
    OUT,
    SPANS,
    c_item,
    c_head,
    c_row,
    v_item,
    v_head,
    v_row,
    num_queries,
    num_keys,
    first_chunk,
    heads_per_group,
    chunks,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    chunk, head, item = first_chunk + tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    group = head // heads_per_group
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    o_key, o_dim = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, PADDED)
    m_dim = (o_dim < WIDTH)[None, :]
    p_value = V + item * v_item + group.to(tl.int64) * v_head + o_key.to(tl.int64)[:, None] * v_row + o_dim[None, :]
    m_value = ((o_key >= first) & (o_key < num_keys))[:, None] & m_dim
    value = tl.load(p_value, mask=m_value, other=0.0).to(tl.float32)  # [CHUNK, PADDED]
    place = (item * (heads // heads_per_group) + group) * chunks + chunk
    before = tl.load(BEFORE + place * WIDTH + o_dim, mask=o_dim < WIDTH, other=0.0)
    total = tl.cumsum(value, 0) + before[None, :]
    row = o_key - (num_keys - num_queries)
    _, length = row_span(row, num_queries, num_keys, first, real, True)
    m_row = (row >= 0) & (row < num_queries)
    mean = tl.where((length > 0)[:, None], total / tl.maximum(length, 1).to(tl.float32)[:, None], 0.0)
    place = ((item * heads + head) * num_queries + row).to(tl.int64)
    share = tl.load(MIX + place, mask=m_row, other=0.0).to(tl.float32)[:, None]
    m_out = m_row[:, None] & m_dim
    p_context = C + item * c_item + head.to(tl.int64) * c_head + row.to(tl.int64)[:, None] * c_row + o_dim[None, :]
    context = tl.load(p_context, mask=m_out, other=0.0).to(tl.float32)
    mixed = share * context + (1 - share) * mean
    tl.store(OUT + place[:, None] * WIDTH + o_dim[None, :], mixed.to(OUT.dtype.element_ty), mask=m_out)
