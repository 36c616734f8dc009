"""Triton forward with the gradients of the PyTorch form, which computes the scores again chunk by chunk."""

import torch
from torch import Tensor

from ..masks import BinMask, RunMask
from ..spans import row_spans
from . import reference, triton


class TritonAttention(torch.autograd.Function):
    """Sparse attention whose forward pass runs in Triton."""

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        row_scale: Tensor | None,
        mask: BinMask | RunMask,
        attention_mask: Tensor | None,
        causal: bool,
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, row_scale)
        ctx.rest = mask, attention_mask, causal, scaling
        return triton.sparse_attention(
            query,
            key,
            value,
            mask,
            causal=causal,
            scaling=scaling,
            attention_mask=attention_mask,
            row_scale=row_scale,
        )

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        mask, attention_mask, causal, scaling = ctx.rest
        inputs = [None if tensor is None else tensor.detach() for tensor in ctx.saved_tensors]
        wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
        with torch.enable_grad():
            for tensor in wanted:
                tensor.requires_grad_()
            *qkv, row_scale = inputs
            rows = (len(qkv[0]), qkv[0].shape[2], qkv[1].shape[2])
            spans = row_spans(*rows, causal=causal, attention_mask=attention_mask, device=grad_output.device)
            output = reference.sparse_attention(*qkv, mask, spans, causal=causal, scaling=scaling, row_scale=row_scale)
            grads = iter(torch.autograd.grad(output, wanted, grad_output))
        needed = ctx.needs_input_grad[:4]
        return (*(next(grads) if need else None for need in needed), None, None, None, None)
