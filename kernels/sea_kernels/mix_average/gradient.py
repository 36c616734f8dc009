"""Triton forward with the gradients of the PyTorch form."""

import torch
from torch import Tensor

from ..spans import RowSpans
from . import reference, triton


class TritonMix(torch.autograd.Function):
    """``mix_average`` whose forward pass runs in Triton."""

    @staticmethod
    def forward(
        ctx, context: Tensor, value: Tensor, mix: Tensor, spans: RowSpans, attention_mask: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(context, value, mix)
        ctx.spans = spans
        return triton.mix_average(context, value, mix, attention_mask)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            output = reference.mix_average(*inputs, ctx.spans)
        grads = torch.autograd.grad(output, inputs, grad_output)
        needed = ctx.needs_input_grad[:3]
        return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None)
