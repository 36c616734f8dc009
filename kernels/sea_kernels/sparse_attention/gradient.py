"""Sparse attention in Triton, forward and backward, as one differentiable function."""

import torch
from torch import Tensor

from ..chunks import is_differentiated
from ..masks import BinMask, RunMask
from . import triton, triton_backward


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BinMask | RunMask,
    *,
    causal: bool,
    scaling: float,
    attention_mask: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:
    """See :func:`sea_kernels.sparse_attention`."""
    place = {"causal": causal, "scaling": scaling, "attention_mask": attention_mask}
    if is_differentiated(query, key, value, row_scale):
        return TritonAttention.apply(query, key, value, row_scale, mask, place)
    return triton.sparse_attention(query, key, value, mask, row_scale=row_scale, **place)[0]


class TritonAttention(torch.autograd.Function):
    """Keeps the inputs, the output, one number per row and what blocks of rows walk; scores are computed again."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, row_scale: Tensor | None, mask: BinMask | RunMask, place: dict
    ) -> Tensor:
        log_sum = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        options = {"row_scale": row_scale, "log_sum": log_sum, **place}
        output, ctx.lists = triton.sparse_attention(query, key, value, mask, **options)
        ctx.save_for_backward(query, key, value, row_scale, output, log_sum)
        ctx.mask, ctx.place = mask, place
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        masks = ctx.mask, ctx.lists
        grads = triton_backward.sparse_attention_backward(grad_output, *ctx.saved_tensors, *masks, **ctx.place)
        needed = ctx.needs_input_grad[:4]
        return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None)
