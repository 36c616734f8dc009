"""Triton forward with the gradients of the PyTorch form."""

import torch
from torch import Tensor

from ..spans import row_spans
from . import reference, triton


class TritonMix(torch.autograd.Function):
    """``mix_average`` whose forward pass runs in Triton."""

    @staticmethod
    def forward(ctx, context: Tensor, value: Tensor, mix: Tensor, attention_mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(context, value, mix)
        ctx.attention_mask = attention_mask
        return triton.mix_average(context, value, mix, attention_mask)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        rows = (len(inputs[0]), inputs[0].shape[2], inputs[1].shape[2])
        spans = row_spans(*rows, causal=True, attention_mask=ctx.attention_mask, device=grad_output.device)
        with torch.enable_grad():
            output = reference.mix_average(*inputs, spans)
        grads = torch.autograd.grad(output, inputs, grad_output)
        needed = ctx.needs_input_grad[:3]
        return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), None)
