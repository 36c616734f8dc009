"""The pooled-key scores in Triton, differentiable."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..spans import row_spans
from . import reference, triton, triton_backward


class TritonScores(torch.autograd.Function):
    """``pooled_scores`` whose passes run in Triton; relative bins are differentiated by the PyTorch form.

    A relative bin without keys scores as its nearest key, and causal rows have edges of their own: each key would have
    to ask every row which of its bins the key stands for.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, attention_mask: Tensor | None, options: dict) -> Tensor:
        ctx.save_for_backward(query, key, attention_mask)
        ctx.options = options
        return triton.pooled_scores(query, key, attention_mask=attention_mask, **options)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, attention_mask = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if ctx.options["layout"] == "aligned":
            options = {name: option for name, option in ctx.options.items() if name not in ("layout", "shift")}
            options |= {"attention_mask": attention_mask, "want_key": needed[1]}
            grads = triton_backward.pooled_scores_gradients(*inputs, grad_output, **options)
        else:
            grads = _differentiate_reference(*inputs, attention_mask, grad_output, ctx.options)
        return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None)


class TritonWeightedScores(torch.autograd.Function):
    """``weighted_scores`` of aligned bins whose passes run in Triton."""

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        mean_weight: Tensor,
        bound_weight: Tensor,
        attention_mask: Tensor | None,
        options: dict,
    ) -> Tensor:
        inputs = query, key, mean_weight.contiguous(), bound_weight.contiguous()
        scores, pooled = triton.weighted_scores(*inputs, attention_mask=attention_mask, **options)
        ctx.save_for_backward(*inputs, pooled, attention_mask)
        ctx.options = options
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *saved, attention_mask = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        options = {name: ctx.options[name] for name in ("causal", "scaling")}
        options |= {"attention_mask": attention_mask, "want_key": needed[1]}
        grads = triton_backward.weighted_scores_gradients(*saved, grad_output, **options)
        return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None)


def _differentiate_reference(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, grad_output: Tensor, options: dict
) -> tuple[Tensor, ...]:
    """Gradients of the PyTorch form, which pools and scores again."""
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key)]
    rows = (len(query), query.shape[2], key.shape[2])
    spans = row_spans(*rows, causal=options["causal"], attention_mask=attention_mask, device=grad_output.device)
    with torch.enable_grad():
        scores = reference.pooled_scores(*inputs, spans, padded=attention_mask is not None, **options)
    return torch.autograd.grad(scores, inputs, grad_output)
