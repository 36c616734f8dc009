"""Triton form of the estimator's loss: a program holds the K bins of a few rows in registers.

Its gradient has a closed form, which needs nothing but what the loss was computed from. With p_b = n_b e_b the row's
mass in bin b: d KL / d y_b = p_b - tau_b, and the squared error's is p_b (u_b - sum p u), u = 2 (p - tau) / n.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bins import Layout
from ..triton_common import (
    aligned_level,
    cdiv,
    count_levels,
    item_span,
    next_power_of_2,
    on_device,
    row_span,
    with_dense_rows,
)
from ..triton_entries import relative_start


def estimation_loss(
    scores: Tensor,
    mass: Tensor,
    entropy: Tensor,
    square: Tensor,
    spans: Tensor | None,
    *,
    layout: Layout,
    causal: bool,
    num_keys: int,
    shift: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`sea_kernels.estimation_loss`; ``spans`` are those of ``triton_common.item_spans``. No gradients."""
    scores, mass = with_dense_rows(scores), mass.contiguous()
    divergence = scores.new_empty(scores.shape[:3], dtype=torch.float32)
    square_error = torch.empty_like(divergence)
    rows = entropy.contiguous(), square.contiguous()
    grid, args, sizes = _launch(scores, spans, layout, causal, num_keys, shift)
    with on_device(scores):
        _loss_kernel[grid](scores, mass, *rows, divergence, square_error, *args, **sizes)
    return divergence, square_error


def estimation_gradient(
    grad_divergence: Tensor,
    grad_square_error: Tensor,
    scores: Tensor,
    mass: Tensor,
    spans: Tensor | None,
    *,
    layout: Layout,
    causal: bool,
    num_keys: int,
    shift: int,
) -> Tensor:
    """Gradient of both losses with respect to the scores ``[N, H, T, K]``, in their dtype."""
    scores, mass = with_dense_rows(scores), mass.contiguous()
    grad_scores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    rows = grad_divergence.contiguous(), grad_square_error.contiguous()
    grid, args, sizes = _launch(scores, spans, layout, causal, num_keys, shift)
    with on_device(scores):
        _gradient_kernel[grid](scores, mass, *rows, grad_scores, *args, **sizes)
    return grad_scores


def _launch(
    scores: Tensor, spans: Tensor | None, layout: Layout, causal: bool, num_keys: int, shift: int
) -> tuple[tuple, tuple, dict]:
    """Grid, arguments and sizes that both kernels have in common."""
    batch, heads, num_queries, num_bins = scores.shape
    padded = next_power_of_2(num_bins)
    rows = max(1, 2048 // padded)
    args = spans, *scores.stride()[:3], num_queries, num_keys, count_levels(num_keys, num_bins), shift
    sizes = {"NUM_BINS": num_bins, "BINS_PADDED": padded, "ROWS": rows, "CAUSAL": causal, "num_warps": 4}
    sizes |= {"HAS_PADDING": spans is not None, "RELATIVE": layout == "relative", "HAS_SHIFT": shift != 0}
    return (cdiv(num_queries, rows), heads, batch), args, sizes


@triton.jit
def _load_estimate(
    Y,
    MASS,
    SPANS,
    y_item,
    y_head,
    y_row,
    num_queries,
    num_keys,
    num_levels,
    shift,
    NUM_BINS: tl.constexpr,
    BINS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """The places of the program's rows and whether they exist, then of all bins: the estimate's mass, the base-2
    logarithm of its mass per key, the teacher's mass, one over the number of keys, and whether there are any."""
    LOG2E: tl.constexpr = 1.4426950408889634
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first, real = item_span(SPANS, item, num_keys, HAS_PADDING)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _, length = row_span(rows, num_queries, num_keys, first, real, CAUSAL)
    place = (item * tl.num_programs(1) + head) * num_queries + rows
    o_bin = tl.arange(0, BINS_PADDED)
    if RELATIVE:
        start = relative_start(o_bin[None, :], length[:, None], shift, NUM_BINS, HAS_SHIFT)
        end = relative_start(o_bin[None, :] + 1, length[:, None], shift, NUM_BINS, HAS_SHIFT)
    else:
        level = aligned_level(length, num_levels, NUM_BINS)
        start = o_bin[None, :] << level[:, None]
        end = tl.minimum(start + (1 << level)[:, None], length[:, None])
    filled = (end > start) & (o_bin < NUM_BINS)[None, :]  # [ROWS, BINS]
    size = tl.where(filled, end - start, 1).to(tl.float32)

    p_y = Y + item * y_item + head * y_head + rows.to(tl.int64)[:, None] * y_row + o_bin[None, :]
    scores = tl.load(p_y, mask=filled, other=0.0).to(tl.float32) * LOG2E
    weighted = tl.where(filled, scores + tl.log2(size), float("-inf"))
    highest = tl.where(length > 0, tl.max(weighted, 1), 0.0)
    weights = tl.exp2(weighted - highest[:, None])
    total = tl.where(length > 0, tl.sum(weights, 1), 1.0)
    logs = tl.where(filled, scores - (highest + tl.log2(total))[:, None], 0.0)
    target = tl.load(MASS + place[:, None] * NUM_BINS + o_bin[None, :], mask=filled, other=0.0).to(tl.float32)
    return place, rows < num_queries, weights / total[:, None], logs, target, 1.0 / size, filled


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "shift"])
def _loss_kernel(
    Y,
    MASS,
    ENTROPY,
    SQUARE,
    DIVERGENCE,
    SQUARE_ERROR,
    SPANS,
    y_item,
    y_head,
    y_row,
    num_queries,
    num_keys,
    num_levels,
    shift,
    NUM_BINS: tl.constexpr,
    BINS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    LN2: tl.constexpr = 0.6931471805599453
    place, m_row, estimate, logs, target, per_key, _ = _load_estimate(
        Y,
        MASS,
        SPANS,
        y_item,
        y_head,
        y_row,
        num_queries,
        num_keys,
        num_levels,
        shift,
        NUM_BINS,
        BINS_PADDED,
        ROWS,
        CAUSAL,
        HAS_PADDING,
        RELATIVE,
        HAS_SHIFT,
    )
    entropy = tl.load(ENTROPY + place, mask=m_row, other=0.0).to(tl.float32)
    square = tl.load(SQUARE + place, mask=m_row, other=0.0).to(tl.float32)
    divergence = entropy - LN2 * tl.sum(target * logs, 1)
    # The distance to the teacher's mean in each bin, plus the teacher's own spread around these means.
    spread = tl.maximum(square - tl.sum(target * target * per_key, 1), 0.0)
    error = estimate - target
    square_error = tl.sum(error * error * per_key, 1) + spread
    tl.store(DIVERGENCE + place, divergence, mask=m_row)  # all terms of a padding row are 0
    tl.store(SQUARE_ERROR + place, square_error, mask=m_row)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_levels", "shift"])
def _gradient_kernel(
    Y,
    MASS,
    GRAD_DIVERGENCE,
    GRAD_SQUARE_ERROR,
    GRAD_Y,
    SPANS,
    y_item,
    y_head,
    y_row,
    num_queries,
    num_keys,
    num_levels,
    shift,
    NUM_BINS: tl.constexpr,
    BINS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    place, m_row, estimate, _, target, per_key, filled = _load_estimate(
        Y,
        MASS,
        SPANS,
        y_item,
        y_head,
        y_row,
        num_queries,
        num_keys,
        num_levels,
        shift,
        NUM_BINS,
        BINS_PADDED,
        ROWS,
        CAUSAL,
        HAS_PADDING,
        RELATIVE,
        HAS_SHIFT,
    )
    of_divergence = estimate - target
    slope = 2.0 * (estimate - target) * per_key
    of_square_error = estimate * (slope - tl.sum(estimate * slope, 1)[:, None])
    grad_divergence = tl.load(GRAD_DIVERGENCE + place, mask=m_row, other=0.0)[:, None]
    grad_square_error = tl.load(GRAD_SQUARE_ERROR + place, mask=m_row, other=0.0)[:, None]
    grad = grad_divergence * of_divergence + grad_square_error * of_square_error
    grad = tl.where(filled, grad, 0.0)  # padding rows have no filled bin, whatever gradient comes in
    o_bin = tl.arange(0, BINS_PADDED)
    m_out = m_row[:, None] & (o_bin < NUM_BINS)[None, :]
    tl.store(GRAD_Y + place[:, None] * NUM_BINS + o_bin[None, :], grad.to(GRAD_Y.dtype.element_ty), mask=m_out)
