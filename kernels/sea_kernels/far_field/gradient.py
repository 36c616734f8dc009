"""Triton forward with the gradients of the PyTorch form, which computes the scores again chunk by chunk."""

import torch
from torch import Tensor

from ..masks import BinMask, RunMask
from ..spans import row_spans
from . import reference, triton


class TritonFarField(torch.autograd.Function):
    """``far_field_attention`` whose forward pass runs in Triton."""

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        centre: Tensor,
        kept: BinMask | RunMask,
        coarse: BinMask | None,
        attention_mask: Tensor | None,
        causal: bool,
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, centre)
        ctx.rest = kept, coarse, attention_mask, causal, scaling
        output, _ = triton.far_field_attention(
            query,
            key,
            value,
            kept,
            coarse,
            centre=centre,
            causal=causal,
            scaling=scaling,
            attention_mask=attention_mask,
        )
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kept, coarse, attention_mask, causal, scaling = ctx.rest
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        query, key, value, centre = inputs
        rows = (len(query), query.shape[2], key.shape[2])
        spans = row_spans(*rows, causal=causal, attention_mask=attention_mask, device=query.device)
        with torch.enable_grad():
            output = reference.far_field_attention(
                query, key, value, kept, coarse, spans, centre=centre, causal=causal, scaling=scaling
            )
        grads = torch.autograd.grad(output, inputs, grad_output)
        needed = ctx.needs_input_grad[:4]
        return (
            *(grad if need else None for grad, need in zip(grads, needed, strict=True)),
            None,
            None,
            None,
            None,
            None,
        )
