"""Attention between a host's projections, one function of (query, key, value) for each method that is compared."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

FUSED = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
WINDOW = 64  # keys of the sliding window: as many as SEA keeps
BLOCK = 128  # rows and keys of a block of FlexAttention's mask


def sdpa(backend: str, causal: bool) -> Attention:
    """PyTorch's attention in one of its fused forms, a key of ``FUSED``."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(FUSED[backend]):
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    return attend


def eager(causal: bool) -> Attention:
    """Scores of all pairs in memory, as a model computes attention that has no fused form."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT * query.shape[-1] ** -0.5
        if causal:
            size = query.shape[2], key.shape[2]
            scores = scores + torch.full(size, float("-inf"), device=query.device, dtype=query.dtype).triu(1)
        return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value

    return attend


def flex_window(seq_len: int, causal: bool, device: str = "cuda", compiled: bool = True) -> Attention:
    """A sliding window of ``WINDOW`` keys: the last ones, or as many on either side."""

    def near(item: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if causal:
            return (key <= row) & (row - key < WINDOW)
        return (row - key <= WINDOW // 2) & (key - row < WINDOW // 2)

    mask = _window_blocks(seq_len, causal, device, near)
    attend = _compiled_flex_attention() if compiled else flex_attention
    return lambda query, key, value: attend(query, key, value, block_mask=mask)


def _window_blocks(seq_len: int, causal: bool, device: str, near: Callable) -> BlockMask:
    """Each block of rows with its neighbours: the general way to find them looks at all T x T pairs."""
    blocks = -(-seq_len // BLOCK)
    row = torch.arange(blocks, device=device, dtype=torch.int32)
    first, last = (row - 1).clamp_min(0), row if causal else (row + 1).clamp_max(blocks - 1)
    index = (first[:, None] + torch.arange(blocks, device=device, dtype=torch.int32)).clamp_max(blocks - 1)
    count = last - first + 1
    return BlockMask.from_kv_blocks(
        count[None, None], index[None, None], BLOCK_SIZE=BLOCK, mask_mod=near, seq_lengths=(seq_len, seq_len)
    )


@functools.cache
def _compiled_flex_attention() -> Callable:
    """Compiled once: a function compiled for each length anew takes longer than all measurements."""
    return torch.compile(flex_attention)
