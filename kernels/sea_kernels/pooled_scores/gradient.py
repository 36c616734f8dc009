"""Triton forward with the gradients of the PyTorch form, which pools and scores again."""

import torch
from torch import Tensor

from ..spans import row_spans
from . import reference, triton


class TritonScores(torch.autograd.Function):
    """``pooled_scores`` whose forward pass runs in Triton."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, attention_mask: Tensor | None, options: dict) -> Tensor:
        ctx.save_for_backward(query, key, attention_mask)
        ctx.options = options
        return triton.pooled_scores(query, key, attention_mask=attention_mask, **options)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, attention_mask = ctx.saved_tensors
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        rows = (len(inputs[0]), inputs[0].shape[2], inputs[1].shape[2])
        causal = ctx.options["causal"]
        spans = row_spans(*rows, causal=causal, attention_mask=attention_mask, device=grad_output.device)
        with torch.enable_grad():
            scores = reference.pooled_scores(*inputs, spans, padded=attention_mask is not None, **ctx.options)
        grads = torch.autograd.grad(scores, inputs, grad_output)
        needed = ctx.needs_input_grad[:2]
        return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None)
