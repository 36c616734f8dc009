"""PyTorch form: a running sum of the values."""

import torch
from torch import Tensor

from ..chunks import working_dtype
from ..spans import RowSpans


def running_mean(value: Tensor, spans: RowSpans) -> Tensor:
    """Mean of the values that each row may see: ``[N, G, T, E]`` in the working dtype, zero in padding rows."""
    num_rows, num_keys = spans.length.shape[1], value.shape[2]
    key = torch.arange(num_keys, device=value.device)
    real = (key >= spans.start[:, None])[:, None, :, None]
    total = (value.to(working_dtype(value.dtype)) * real).cumsum(2)[:, :, num_keys - num_rows :]
    length = spans.length[:, None, :, None]
    return torch.where(length > 0, total / length.clamp_min(1), 0)


def mix_average(context: Tensor, value: Tensor, mix: Tensor, spans: RowSpans) -> Tensor:
    """See :func:`sea_kernels.mix_average`."""
    mean = running_mean(value, spans).repeat_interleave(context.shape[1] // value.shape[1], dim=1)
    mix = mix[..., None].to(mean.dtype)
    return (mix * context.to(mean.dtype) + (1 - mix) * mean).to(context.dtype)
