"""Sliding window and first tokens: as many keys per row as SEA keeps, chosen by their position alone."""

import math

import torch
from torch import Tensor

import sea_kernels as ops
from sea_kernels.masks import RunMask
from sea_kernels.spans import RowSpans, row_spans

from ...config import WINDOW_FIRST_TOKENS
from .base import BaselineAttention


class WindowAttention(BaselineAttention):
    """Exact softmax attention over the first tokens and the keys around each row.

    Knobs: ``k``, ``backend``. Works with a key-value cache.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        attention_mask: Tensor | None = None,
        with_scores: bool = True,
    ) -> tuple[Tensor, None]:
        place = {"causal": self.causal, "attention_mask": attention_mask}
        spans = row_spans(len(query), query.shape[2], key.shape[2], device=query.device, **place)
        choose = recent_keys if self.causal else surrounding_keys
        mask = choose(spans, self.config.k, query.shape[1])
        context = ops.sparse_attention(query, key, value, mask, scaling=scaling, backend=self.config.backend, **place)
        return context.transpose(1, 2), None


def recent_keys(spans: RowSpans, k: int, num_heads: int) -> RunMask:
    """Causal form: the first 4 tokens and the most recent k - 4 keys, the row's own among them; all if k or fewer."""
    window = k - WINDOW_FIRST_TOKENS - 1  # beside the row's own key
    first = torch.arange(WINDOW_FIRST_TOKENS, dtype=torch.int32, device=spans.start.device)
    before_window = first < (spans.position - window)[..., None]
    return RunMask(_for_heads(torch.where(before_window, first, -1), num_heads), width=1, window=window)


def surrounding_keys(spans: RowSpans, k: int, num_heads: int) -> RunMask:
    """Bidirectional form: the first 4 tokens and the k - 4 keys around the row, moved inwards at both ends.

    The window moves in runs of gcd(k, 4) keys. A row that keeps the item's last run has as many keys fewer as that run
    is short of; an item of k or fewer tokens keeps all.
    """
    width = math.gcd(k, WINDOW_FIRST_TOKENS)
    num_first, num_runs = WINDOW_FIRST_TOKENS // width, k // width
    num_near = num_runs - num_first
    own = spans.position // width
    of_item = (spans.length + width - 1) // width  # 0 in padding rows, which then keep nothing
    begin = (own - num_near // 2).minimum(of_item - num_near).clamp_min(num_first)
    index = torch.arange(num_runs, device=own.device)
    run = torch.where(index < num_first, index, begin[..., None] + index - num_first)  # [N, T, k / width]
    starts = torch.where(run < of_item[..., None], width * run, -1)
    return RunMask(_for_heads(starts.int(), num_heads), width)


def _for_heads(starts: Tensor, num_heads: int) -> Tensor:
    return starts[:, None].expand(-1, num_heads, -1, -1)
