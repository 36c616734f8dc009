"""The far field in Triton, differentiable."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..chunks import is_differentiated
from ..masks import BinMask, RunMask
from . import triton, triton_backward
from .triton_pool import Pool


def far_field_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: BinMask | RunMask,
    coarse: BinMask | None,
    *,
    centre: Tensor,
    causal: bool,
    scaling: float,
    attention_mask: Tensor | None,
) -> Tensor:
    """See :func:`sea_kernels.far_field_attention`."""
    if is_differentiated(query, key, value, centre):
        return TritonFarField.apply(query, key, value, centre, kept, coarse, attention_mask, causal, scaling)
    place = {"causal": causal, "scaling": scaling, "attention_mask": attention_mask}
    return triton.far_field_attention(query, key, value, kept, coarse, centre=centre, **place)[0]


class TritonFarField(torch.autograd.Function):
    """``far_field_attention`` whose passes both run in Triton."""

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
        place = {"causal": causal, "scaling": scaling, "attention_mask": attention_mask}
        output, log_sums, bins, ctx.lists = triton.far_field_attention(
            query, key, value, kept, coarse, centre=centre, for_backward=True, **place
        )
        ctx.save_for_backward(query, key, value, centre, output, log_sums, *bins)
        ctx.masks, ctx.place = (kept, coarse), place
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *saved, key, value, offset = ctx.saved_tensors
        bins = Pool(key, value, offset)
        grads = triton_backward.far_field_gradients(*saved, bins, ctx.lists, grad_output, *ctx.masks, **ctx.place)
        grads = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))
        return (*grads, None, None, None, None, None)
