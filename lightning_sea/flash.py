"""Flash attention that also hands over its log-sum-exps, which PyTorch's own function computes and drops."""

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend

HALF = (torch.float16, torch.bfloat16)
aten = torch.ops.aten


def attend_with_log_sum(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scaling: float
) -> tuple[Tensor, Tensor] | None:
    """Softmax attention without mask and dropout, with the log-sum-exps of its rows; None where it cannot be flash.

    On a GPU the context may differ by half precision's rounding from that of ``scaled_dot_product_attention``, which
    may choose another kernel (cuDNN's). On a CPU this is the kernel that it chooses, and the context is the same.

    Args:
        query: ``[N, H, T, D]``; half precision on a GPU, on a CPU also float32.
        key, value: ``[N, G, S, D]``.
        causal: whether row t sees the keys 0 … t only, which needs T = S.
        scaling: factor of the scores.

    Returns:
        The context ``[N, H, T, D]``, and float32 ``[N, H, T]``: log of the sum of ``exp(scaling * q . k)`` over the
        keys that the row sees. Exact to float32's rounding, but for half precision on a CPU, whose kernel approximates
        the exponentials (errors near 1e-4).
    """
    tensors, grouped = (query, key, value), query.shape[1] != key.shape[1]
    if query.is_cuda:
        fits = query.dtype in HALF and query.shape[-1] % 8 == 0
        if fits and can_use_flash_attention(SDPAParams(*tensors, None, 0.0, causal, grouped)):
            return aten._scaled_dot_product_flash_attention.default(*tensors, 0.0, causal, scale=scaling)[:2]
    elif query.device.type == "cpu" and query.dtype in (*HALF, torch.float32) and not torch.is_autocast_enabled("cpu"):
        options = {"scale": scaling, "enable_gqa": grouped}
        choice = torch._fused_sdp_choice(*tensors, is_causal=causal, **options)
        if choice == SDPBackend.FLASH_ATTENTION.value:
            return aten._scaled_dot_product_flash_attention_for_cpu.default(*tensors, 0.0, causal, scale=scaling)
    return None
