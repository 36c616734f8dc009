"""Triton forward with the gradients of the PyTorch form, which runs again in chunks."""

import torch
from torch import Tensor

from . import reference, triton
from .state import LinearState


class TritonCausal(torch.autograd.Function):
    """Causal linear attention whose forward pass runs in Triton. The state goes in and out as two tensors."""

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_value: Tensor | None,
        key_sum: Tensor | None,
        projection: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(query, key, value, key_value, key_sum, projection, attention_mask)
        ctx.scaling = scaling
        state = None if key_value is None else LinearState(key_value, key_sum)
        output, state = triton.causal(
            query, key, value, projection, scaling=scaling, attention_mask=attention_mask, initial_state=state
        )
        return output, *state

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, projection, attention_mask = ctx.saved_tensors

        def function(query, key, value, key_value, key_sum):
            state = None if key_value is None else LinearState(key_value, key_sum)
            output, state = reference.causal(
                query,
                key,
                value,
                projection,
                scaling=ctx.scaling,
                attention_mask=attention_mask,
                initial_state=state,
            )
            return output, *state

        return *_gradients(function, inputs, grads, ctx.needs_input_grad), None, None, None


class TritonBidirectional(torch.autograd.Function):
    """Bidirectional linear attention whose forward pass runs in Triton."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, projection: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, projection, attention_mask)
        return triton.bidirectional(query, key, value, projection, attention_mask=attention_mask)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, projection, attention_mask = ctx.saved_tensors

        def function(query, key, value):
            return (reference.bidirectional(query, key, value, projection, attention_mask=attention_mask),)

        return *_gradients(function, inputs, (grad_output,), ctx.needs_input_grad), None, None


def _gradients(function, inputs: list[Tensor | None], grads: tuple[Tensor, ...], needed: tuple[bool, ...]) -> list:
    """Gradients of ``function(*inputs)`` to the inputs that need one, None for the others."""
    inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=False) if need]
    with torch.enable_grad():
        for tensor in wanted:
            tensor.requires_grad_()
        outputs = function(*inputs)
    found = iter(torch.autograd.grad(outputs, wanted, grads))
    return [next(found) if need else None for need in needed[: len(inputs)]]
