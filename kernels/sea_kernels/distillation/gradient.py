"""Triton forms of the losses with the gradients of their own kernels."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..bins import Layout
from ..triton_common import item_spans, with_dense_rows
from . import triton_attention, triton_attention_backward, triton_estimation, triton_states
from .triton_attention import RowNumbers, Tensors


class TritonEstimationLoss(torch.autograd.Function):
    """``estimation_loss`` in Triton. Gradients flow to the scores only."""

    @staticmethod
    def forward(
        ctx,
        scores: Tensor,
        mass: Tensor,
        entropy: Tensor,
        square: Tensor,
        layout: Layout,
        causal: bool,
        num_keys: int,
        attention_mask: Tensor | None,
        shift: int,
    ) -> tuple[Tensor, Tensor]:
        spans = item_spans(attention_mask)
        ctx.save_for_backward(scores, mass, spans)
        ctx.bins = {"layout": layout, "causal": causal, "num_keys": num_keys, "shift": shift}
        return triton_estimation.estimation_loss(scores, mass, entropy, square, spans, **ctx.bins)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_divergence: Tensor, grad_square_error: Tensor) -> tuple[Tensor | None, ...]:
        grad = triton_estimation.estimation_gradient(grad_divergence, grad_square_error, *ctx.saved_tensors, **ctx.bins)
        return (grad, *[None] * 8)


class TritonAttentionLoss(torch.autograd.Function):
    """``attention_loss`` in Triton. Gradients flow to the student's query and key only."""

    @staticmethod
    def forward(
        ctx,
        teacher_query: Tensor,
        teacher_key: Tensor,
        query: Tensor,
        key: Tensor,
        attention_mask: Tensor | None,
        teacher_log_sum: Tensor | None,
        causal: bool,
        teacher_scaling: float,
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        tensors = Tensors(*map(with_dense_rows, (teacher_query, teacher_key, query, key)))
        spans = item_spans(attention_mask)
        ctx.rest = {"causal": causal, "teacher_scaling": teacher_scaling, "scaling": scaling}
        *losses, numbers = triton_attention.attention_loss(tensors, spans, teacher_log_sum, **ctx.rest)
        ctx.save_for_backward(*tensors, *numbers, spans)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_divergence: Tensor, grad_square_error: Tensor) -> tuple[Tensor | None, ...]:
        *saved, spans = ctx.saved_tensors
        _, _, want_query, want_key, *_ = ctx.needs_input_grad
        grads = triton_attention_backward.attention_gradients(
            grad_divergence,
            grad_square_error,
            Tensors(*saved[:4]),
            RowNumbers(*saved[4:]),
            spans,
            want_query=want_query,
            want_key=want_key,
            **ctx.rest,
        )
        return (None, None, *grads, *[None] * 5)


class TritonStateLoss(torch.autograd.Function):
    """``state_loss`` in Triton. Gradients flow to the student's states only.

    Takes the teacher's states and then the student's, as many.
    """

    @staticmethod
    def forward(ctx, real: Tensor | None, relative: bool, *states: Tensor) -> Tensor:
        states = [with_dense_rows(state) for state in states]
        pairs = len(states) // 2
        loss, factors = triton_states.state_loss(states[:pairs], states[pairs:], real, relative)
        ctx.save_for_backward(real, factors, *states)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        real, factors, *states = ctx.saved_tensors
        pairs = len(states) // 2
        rows = zip(factors, states[:pairs], states[pairs:], ctx.needs_input_grad[2 + pairs :], strict=True)
        grads = [triton_states.state_gradient(grad_output, *own, real) if needed else None for *own, needed in rows]
        return (None, None, *[None] * pairs, *grads)
