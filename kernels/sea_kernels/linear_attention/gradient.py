"""Gradients of the Triton forms: kernels for causal rows, the PyTorch form run again for bidirectional ones."""

import torch
from torch import Tensor

from . import reference, triton
from .state import LinearState
from .triton_backward import causal_gradients


class TritonCausal(torch.autograd.Function):
    """Causal linear attention in Triton. The state goes in and out as two tensors."""

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
        state = None if key_value is None else LinearState(key_value, key_sum)
        options = {"scaling": scaling, "attention_mask": attention_mask, "initial_state": state}
        output, state, normaliser = triton.causal(query, key, value, projection, **options)
        ctx.save_for_backward(query, key, value, key_value, key_sum, projection, attention_mask, output, normaliser)
        ctx.scaling = scaling
        return output, *state

    @staticmethod
    def backward(ctx, grad_output: Tensor, *grad_state: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, key_value, key_sum, projection, attention_mask, *forward = ctx.saved_tensors
        state = None if key_value is None else LinearState(key_value, key_sum)
        options = {"scaling": ctx.scaling, "attention_mask": attention_mask, "initial_state": state}
        *grads, grad_state = causal_gradients(
            query, key, value, projection, *forward, grad_output, LinearState(*grad_state), **options
        )
        if state is not None:
            grad_state = [grad.to(tensor.dtype) for grad, tensor in zip(grad_state, state, strict=True)]
        found = zip((*grads, *grad_state), ctx.needs_input_grad, strict=False)
        return *(grad if need else None for grad, need in found), None, None, None


class TritonBidirectional(torch.autograd.Function):
    """Bidirectional linear attention whose forward pass alone runs in Triton: such models read short inputs."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, projection: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, projection, attention_mask)
        return triton.bidirectional(query, key, value, projection, attention_mask=attention_mask)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, projection, attention_mask = ctx.saved_tensors
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            output = reference.bidirectional(*inputs, projection, attention_mask=attention_mask)
        grads = torch.autograd.grad(output, inputs, grad_output)
        found = zip(grads, ctx.needs_input_grad, strict=False)
        return *(grad if need else None for grad, need in found), None, None
