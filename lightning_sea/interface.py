"""How converted models reach SEA: one attention function and one mask function, registered with transformers.

The registry entries do nothing by themselves; a model uses them once its own configuration names ``IMPLEMENTATION``.
The mask function hands over the 2-D padding mask (or None): no T x S mask is ever built for SEA.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from .attention import Estimate
from .flash import attend_with_log_sum

IMPLEMENTATION = "sea"


@dataclass(frozen=True)
class LayerRecord:
    """One attention layer during one forward pass. None stands for tensors that were dropped because nobody reads them.

    Attributes:
        query: ``[N, H, T, D]``; key, value: ``[N, G, S, D]``, as the host handed them to attention.
        context: ``[N, T, H, D]``.
        scaling: score factor.
        attention_mask: bool ``[N, S]`` or None.
        causal: whether rows see only earlier keys.
        estimate: what SEA estimated; None in layers with plain attention and with the methods that estimate nothing.
        log_sum: float32 ``[N, H, T]``, log-sum-exps of the scores in layers with plain attention; None unless the
            recorder asks for them and flash attention computes them: without padding, in half precision on a GPU.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    context: Tensor
    scaling: float
    attention_mask: Tensor | None
    causal: bool
    estimate: Estimate | None
    log_sum: Tensor | None = None


@torch.compiler.disable
def sea_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention function: SEA in converted layers, plain softmax attention in the others.

    ``torch.compile`` does not look into it: the layers around it compile to one graph before and one after each call,
    so that ``fullgraph=True`` is not possible. Of a model that is compiled as a whole, ``sea_mask`` needs an
    attention mask (all ones without padding); a model whose layers are compiled one by one does not.

    Args:
        module: the host's attention module; SEA is its submodule ``sea``.
        query: ``[N, H, T, D]``; key, value: ``[N, G, S, D]``.
        attention_mask: what ``sea_mask`` returned.
        scaling: score factor; None means 1 / sqrt(D).
        dropout: probability, applied by plain layers only.

    Returns:
        The context ``[N, T, H, D]``, and None in place of attention weights.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: SEA takes the padding mask [batch, num_keys] only"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.dtype != value.dtype:  # under autocast, rotary positions leave queries and keys in float32
        query, key = query.to(value.dtype), key.to(value.dtype)
    recorder, estimate, log_sum = getattr(module, "attention_recorder", None), None, None
    if hasattr(module, "sea"):
        place = {"scaling": scaling, "attention_mask": attention_mask}
        context, estimate = module.sea(query, key, value, with_scores=recorder is not None, **place)
    else:
        context, log_sum = _softmax_attention(
            module, query, key, value, attention_mask, scaling, dropout, recorder is not None and recorder.log_sums
        )
    if recorder is not None:
        place = scaling, attention_mask, module.is_causal
        recorder.keep(LayerRecord(query, key, value, context, *place, estimate, log_sum))
    return context, None


@torch.compiler.disable
def sea_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> Tensor | None:
    """Mask function: the bool padding mask ``[N, S]``, or None without padding.

    Raises:
        ValueError: for masks that are more than causal or bidirectional with contiguous padding.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            "attention_mask or position_ids ask for more than causal or bidirectional attention with padding (packed "
            "sequences, a sliding window, …), which SEA does not build; pass one padded sequence per row (to a model "
            "that is compiled as a whole with its attention_mask, also where that is all ones)"
        )
    if attention_mask is None:
        return None
    if attention_mask.shape[-1] != kv_length:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[-1]} positions and the keys {kv_length}, expected them equal "
            "(a static cache is longer than what was seen: use a dynamic one)"
        )
    mask = attention_mask.bool()
    runs = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(-1)
    full, broken = torch.stack([mask.all(), (runs > 1).any()]).tolist()  # one wait for a GPU per forward pass
    if full:
        return None
    if broken:
        raise ValueError("attention_mask has gaps: the real tokens of an item must be contiguous (pad left or right)")
    return mask


def _softmax_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float,
    want_log_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    num_queries, num_keys = query.shape[2], key.shape[2]
    causal = module.is_causal and num_queries > 1
    mask = None
    if attention_mask is not None or (causal and num_queries != num_keys):
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries) if causal else mask
        mask = mask if attention_mask is None else mask & attention_mask[:, None, None]
    if want_log_sum and mask is None and not dropout:
        both = attend_with_log_sum(query, key, value, causal=causal, scaling=scaling)
        if both is not None:
            return both[0].transpose(1, 2), both[1]
    context = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if mask is not None:  # a padding row sees nothing: softmax over no key is not a number
        context = torch.where(mask.any(-1)[..., None], context, 0)
    return context.transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, sea_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sea_mask)
