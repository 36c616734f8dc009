"""Triton form of the distance between states: sums over blocks of rows, and one program that adds them up.

The loss of an item is its squared error over the teacher's square, so that the gradient to a student's state is its
difference from the teacher's times one factor per item. Nothing as large as a state is kept but the states themselves.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import cdiv, next_power_of_2, on_device, with_dense_rows

TILE = 4096  # elements of a state that a program takes at a time
MOST_COLUMNS = 256  # of them in a row
NUMBERS = 3  # of a block of rows: squared error, square of the teacher, rows that are real; the kernels count on it


def state_loss(
    teacher: Sequence[Tensor], student: Sequence[Tensor], real: Tensor | None, relative: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`sea_kernels.state_loss`. No gradients.

    Args:
        teacher, student: states ``[N, T, A, B]`` of one shape, the last dimension contiguous.
        real: uint8 ``[N, T]``, contiguous, or None.
        relative: whether errors are divided.

    Returns:
        The loss, and for the backward pass float32 ``[pairs, N]``: factors of the difference of two states.
    """
    batch, num_rows, outer, inner = student[0].shape
    grid, sizes = _launch(student[0])
    sums = torch.empty(len(student), batch, grid[0], NUMBERS, dtype=torch.float32, device=student[0].device)
    loss, factors = sums.new_empty(()), sums.new_empty(len(student), batch)
    items = min(32, next_power_of_2(len(student) * batch))
    with on_device(sums):
        for target, state, own in zip(teacher, student, sums, strict=True):
            strides = *target.stride()[:3], *state.stride()[:3]
            _sums_kernel[grid](target, state, real, own, *strides, num_rows, outer, inner, **sizes)
        args = loss, factors, len(student) * batch, grid[0], outer * inner
        _loss_kernel[(1,)](sums, *args, RELATIVE=relative, ITEMS=items, BLOCKS=1024 // items)
    return loss, factors


def state_gradient(
    grad_output: Tensor, factors: Tensor, teacher: Tensor, student: Tensor, real: Tensor | None
) -> Tensor:
    """Gradient to one student's state, like it; ``factors [N]`` are its own."""
    _, num_rows, outer, inner = student.shape
    grad = with_dense_rows(torch.empty_like(student))
    grid, sizes = _launch(student)
    strides = *teacher.stride()[:3], *student.stride()[:3], *grad.stride()[:3]
    with on_device(student):
        _gradient_kernel[grid](
            teacher, student, real, grad_output, factors, grad, *strides, num_rows, outer, inner, **sizes
        )
    return grad


def _launch(state: Tensor) -> tuple[tuple[int, int], dict]:
    """Grid and sizes of the kernels that take blocks of rows."""
    batch, num_rows, _, inner = state.shape
    columns = min(MOST_COLUMNS, next_power_of_2(inner))
    rows = TILE // columns
    return (cdiv(num_rows, rows), batch), {"ROWS": rows, "COLUMNS": columns, "num_warps": 4}


@triton.jit
def _real_rows(REAL, item, num_rows, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = rows < num_rows
    if REAL is not None:
        m_row = m_row & (tl.load(REAL + item * num_rows + rows, mask=m_row, other=0) != 0)
    return rows, m_row


@triton.jit(do_not_specialize=["num_rows", "outer"])
def _sums_kernel(
    TEACHER,
    STUDENT,
    REAL,
    SUMS,
    t_item,
    t_row,
    t_outer,
    s_item,
    s_row,
    s_outer,
    num_rows,
    outer,
    inner,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    item = tl.program_id(1).to(tl.int64)
    rows, m_row = _real_rows(REAL, item, num_rows, ROWS)
    o_column = tl.arange(0, COLUMNS)
    p_t = TEACHER + item * t_item + rows.to(tl.int64)[:, None] * t_row
    p_s = STUDENT + item * s_item + rows.to(tl.int64)[:, None] * s_row
    error = tl.zeros([ROWS, COLUMNS], tl.float32)
    power = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(0, outer):
        for begin in range(0, inner, COLUMNS):
            column = (begin + o_column)[None, :]
            mask = m_row[:, None] & (column < inner)
            target = tl.load(p_t + column, mask=mask, other=0.0).to(tl.float32)
            state = tl.load(p_s + column, mask=mask, other=0.0).to(tl.float32)
            error += (state - target) * (state - target)
            power += target * target
        p_t += t_outer
        p_s += s_outer
    p_sum = SUMS + (item * tl.num_programs(0) + tl.program_id(0)) * 3
    tl.store(p_sum, tl.sum(tl.sum(error, 1), 0))
    tl.store(p_sum + 1, tl.sum(tl.sum(power, 1), 0))
    tl.store(p_sum + 2, tl.sum(m_row.to(tl.float32), 0))


@triton.jit(do_not_specialize=["items", "blocks", "width"])
def _loss_kernel(
    SUMS,
    LOSS,
    FACTORS,
    items,
    blocks,
    width,
    RELATIVE: tl.constexpr,
    ITEMS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    loss = tl.zeros([ITEMS], tl.float32)
    for begin in range(0, items, ITEMS):
        o_item = begin + tl.arange(0, ITEMS)
        m_item = o_item < items
        error = tl.zeros([ITEMS, BLOCKS], tl.float32)
        power = tl.zeros([ITEMS, BLOCKS], tl.float32)
        count = tl.zeros([ITEMS, BLOCKS], tl.float32)
        for first in range(0, blocks, BLOCKS):
            o_block = (first + tl.arange(0, BLOCKS))[None, :]
            p_sum = SUMS + (o_item.to(tl.int64)[:, None] * blocks + o_block) * 3
            mask = m_item[:, None] & (o_block < blocks)
            error += tl.load(p_sum, mask=mask, other=0.0)
            power += tl.load(p_sum + 1, mask=mask, other=0.0)
            count += tl.load(p_sum + 2, mask=mask, other=0.0)
        elements = tl.maximum(tl.sum(count, 1), 1.0) * width
        unit = 1.0 / (elements * items)
        if RELATIVE:
            unit /= tl.maximum(tl.sum(power, 1) / elements, 1e-12)
        loss += tl.where(m_item, tl.sum(error, 1) * unit, 0.0)
        tl.store(FACTORS + o_item, 2.0 * unit, mask=m_item)
    tl.store(LOSS, tl.sum(loss, 0))


@triton.jit(do_not_specialize=["num_rows", "outer"])
def _gradient_kernel(
    TEACHER,
    STUDENT,
    REAL,
    GRAD_LOSS,
    FACTORS,
    GRAD,
    t_item,
    t_row,
    t_outer,
    s_item,
    s_row,
    s_outer,
    g_item,
    g_row,
    g_outer,
    num_rows,
    outer,
    inner,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    item = tl.program_id(1).to(tl.int64)
    rows, m_row = _real_rows(REAL, item, num_rows, ROWS)
    o_column = tl.arange(0, COLUMNS)
    p_t = TEACHER + item * t_item + rows.to(tl.int64)[:, None] * t_row
    p_s = STUDENT + item * s_item + rows.to(tl.int64)[:, None] * s_row
    p_g = GRAD + item * g_item + rows.to(tl.int64)[:, None] * g_row
    factor = tl.load(GRAD_LOSS).to(tl.float32) * tl.load(FACTORS + item)
    for _ in range(0, outer):
        for begin in range(0, inner, COLUMNS):
            column = (begin + o_column)[None, :]
            mask = m_row[:, None] & (column < inner)
            target = tl.load(p_t + column, mask=mask, other=0.0).to(tl.float32)
            state = tl.load(p_s + column, mask=mask, other=0.0).to(tl.float32)
            grad = ((state - target) * factor).to(GRAD.dtype.element_ty)
            tl.store(p_g + column, grad, mask=(rows < num_rows)[:, None] & (column < inner))
        p_t += t_outer
        p_s += s_outer
        p_g += g_outer
