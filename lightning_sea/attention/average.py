"""Average context C_avg, which stands in for the keys that a row does not keep (SEA, section 3.3)."""

import torch
from torch import Tensor

from sea_kernels.bins import bin_of
from sea_kernels.spans import RowSpans


def estimated_mean(value: Tensor, probabilities: Tensor, spans: RowSpans, layout: str, shift: int) -> Tensor:
    """Values weighted by the estimated attention averaged over the real rows (bidirectional form).

    The weights sum to one; the reference's do not, so that its average grows with S / K.

    Args:
        value: ``[N, G, S, D]``.
        probabilities: float32 ``[N, H, T, K]``, the estimated compressed attention.
        spans: of the T = S rows.
        layout, shift: how the K columns stretch to keys.

    Returns:
        ``[N, H, 1, D]`` in value's dtype.
    """
    num_heads, num_bins = probabilities.shape[1], probabilities.shape[-1]
    real_rows = (spans.length > 0).float()
    mean_row = torch.einsum("nhtk,nt->nhk", probabilities, real_rows)
    real = spans.length.amax(-1, keepdim=True)  # [N, 1]
    key = torch.arange(value.shape[2], device=value.device) - spans.start[:, None]
    index = bin_of(key.clamp_min(0), real, num_bins, layout, shift)
    weight = mean_row.gather(-1, index[:, None].expand(-1, num_heads, -1))
    weight = weight * ((key >= 0) & (key < real))[:, None]
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    value = value.repeat_interleave(num_heads // value.shape[1], dim=1)
    return torch.einsum("nhs,nhsd->nhd", weight, value.float())[:, :, None].to(value.dtype)
